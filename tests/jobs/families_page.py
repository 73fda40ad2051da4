"""The page docs/models.md: writes the verdicts of `tests.jobs.families` as a table, and reads them back."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

WAYS = ("full", "LoRA", "QLoRA", "packed", "zero3")
COLUMNS = ("full", "full merged", "LoRA", "LoRA merged", "QLoRA", "QLoRA merged", "packed", "zero3", "zero3 merged")
HEADING = "## What is refused"


@dataclass(frozen=True)
class Cell:
    """What became of one family trained in one way."""

    family: str
    way: str
    verdict: str
    """right, refused (at launch), late (refused only when training starts), wrong or traceback."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.family:<20} {self.way:<7} {self.verdict:<9} {self.detail}"


def table(cells: list[Cell]) -> str:
    """A Markdown table: one line per family, one column per way, and the reasons of refusals below."""
    ways = [way for way in COLUMNS if any(cell.way == way for cell in cells)]
    found = {(cell.family, cell.way): cell for cell in cells}
    lines = ["| family | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for family in dict.fromkeys(cell.family for cell in cells):
        row = [found.get((family, way)) for way in ways]
        lines.append(f"| {family} | " + " | ".join(_short(cell) for cell in row) + " |")
    return "\n".join(lines)


def _short(cell: Cell | None) -> str:
    if cell is None:  # refused before there was anything to merge
        return "-"
    return cell.detail.partition(" ")[0] if cell.verdict == "right" else f"**{cell.verdict}**"


def reasons(cells: list[Cell]) -> str:
    """One line per cell that is not right, with the message that the user sees."""
    return "\n".join(f"- {cell.family}, {cell.way}: {cell.detail}" for cell in cells if cell.verdict != "right")


PAGE = """# Models: families compared with plain transformers and PEFT

2 ranks on CPUs (Gloo, float32) train a tiny random model of each family for 5 steps of AdamW. Under FSDP: all weights,
a LoRA on all linear layers (with the experts that PEFT finds), the same on a base in four bits, and all weights on packed rows.
Under ZeRO-3: all weights. The reference is transformers and PEFT in one process, with every sample alone in its row, and with
bitsandbytes' numbers for a base in four bits. A cell is the largest relative difference of loss or gradient norm over all steps.
`merged` compares the folder that Muster writes: transformers loads it without a missing or unexpected key, config.json has the same
fields, it generates, and the cell is the relative difference of the loss of 8 samples. A merge of QLoRA adds the adapter to the
base as it is stored, and so does its reference. Above 0.002 a cell is called wrong. `refused` means: a message before any job is
queued, which names the key to change; `late`: a message when training starts or merges.
`make families` writes this page; `make families ARGS='--only llama gpt_oss'` only the lines of these, `ARGS='--from cohere'` those
from this one on. Names are those of tests/jobs/families.json.

The launcher refuses from config.json alone. Where kernels for packed rows may be installed on GPUs (flash-linear-attention,
causal-conv1d, mamba-ssm), it lets the hybrid models pass: a trial of a tiny model of the same class then decides, in the job
`preflight` or before the first step, as it does for families that are not listed here.

Multimodal models are gemma3, gemma4, glm4v, internvl, lfm2_vl, llama4, llava_next, mistral3, mistral3_ministral3, qwen2_vl,
qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5 and qwen3_5_moe: there the reference is the whole model with frozen towers.

{table}

## Multimodal models

Muster trains the text of a multimodal model. Rows with images are refused when they are prepared.

- Training builds the decoder and the output head alone. The towers of images and sound stay in the files of `model.source`, and
  the log says so: `vision tower (N tensors, X GiB) stays as it is in SOURCE`. An adapter is put on the decoder only.
- A merge writes the whole model: the trained text under the names of the base, every other tensor with the bytes and the dtype
  of the base, config.json, and the settings of the processor. `evaluate` and `generate` load that whole model.
- Before training, a tiny model of the same classes is tried: the whole model must have the logits and gradients of the decoder
  alone. Another family is refused then. Known to differ, and refused before anything is queued: Cohere 2 Vision (it scales
  logits otherwise), Llama 3.2 Vision (layers that only images train), and models that read no text without an image (BLIP-2,
  InstructBLIP, Kosmos-2).

## Tensors that training does not use

Some models are stored with layers that predict several tokens (`mtp.*`, or a layer after the last). transformers skips those
that it knows, and others are refused. `model.ignore_tensors=["^mtp[.]"]` names them by regular expressions. They are not
loaded. A merge copies them from `model.source` as they are, so that config.json still fits. They were not trained with the
rest: speculative decoding with them may accept fewer tokens. A model that is merged in memory loses them.

{heading}

{reasons}
"""


def result(cells: list[Cell]) -> str:
    """The line that a script can read."""
    counts = Counter(cell.verdict for cell in cells)
    return (
        f"RESULT families={len({cell.family for cell in cells})} right={counts['right']} refused={counts['refused']} "
        f"late={counts['late']} wrong={counts['wrong']} tracebacks={counts['traceback']}"
    )


def page(cells: list[Cell]) -> str:
    """The text of docs/models.md."""
    return PAGE.format(table=table(cells), heading=HEADING, reasons=reasons(cells))


def read_page(text: str) -> list[Cell]:
    """The cells that a page shows."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    ways = lines[0][1:] if lines else []
    refusals = text.partition(HEADING)[2]
    said = dict(line[2:].split(": ", 1) for line in refusals.splitlines() if line.startswith("- "))
    cells = []
    for family, *shown in lines[1:]:
        for way, cell in zip(ways, shown, strict=True):
            if cell == "-":
                continue
            is_right = not cell.startswith("**")
            detail = cell if is_right else said.get(f"{family}, {way}", "")
            cells.append(Cell(family, way, "right" if is_right else cell.strip("*"), detail))
    return cells


def merged(old: list[Cell], new: list[Cell], families: Iterable[str]) -> list[Cell]:
    """The cells of both, the new one where both have it, in the order of `families`."""
    found = {(cell.family, cell.way): cell for cell in [*old, *new]}
    return [found[family, way] for family in families for way in COLUMNS if (family, way) in found]
