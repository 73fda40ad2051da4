"""Makes every checkpoint of other programs, merges each, compares the weights bit for bit, and writes the table of docs/merge.md.

python -m tests.jobs.foreign [--ranks 2,4] [--only NAME,...] [--write docs/merge.md]
"""

import argparse
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from conf.errors import UserError
from jobs.consolidation import external
from tests.jobs.foreign import fsdp, models, peft_zero, trainer, zero
from tests.jobs.ranks import spawn

NAMES = (*zero.CASES, *peft_zero.CASES, *fsdp.CASES, *trainer.CASES)
TO_REFUSE = ("without-head",)
"""The base must not serve what was trained."""
BEGIN, END = "<!-- foreign checkpoints -->", "<!-- end of foreign checkpoints -->"


def write(folder: Path, names: list[str], ranks: int) -> None:
    """Make the checkpoints of these cases, as folder/NAME."""
    for module in (zero, peft_zero, fsdp):
        if wanted := [name for name in names if name in module.CASES]:
            spawn(module.write, ranks, folder, wanted)
    for name in names:
        if name in trainer.CASES:
            spawn(trainer.write, ranks, folder, name)


def result(folder: Path, out: Path) -> str:
    """`equal`, `refused: ...` or `wrong: ...` for one case, merged in fp32 with its base."""
    checkpoint = folder / "ck" if (folder / "ck").exists() else folder / "run/checkpoint-2"
    try:
        external.main([str(checkpoint), "--out", str(out), "--base", str(folder / "base"), "--dtype", "fp32"])
    except UserError as error:
        return f"refused: {str(error).replace(str(folder), '')}"
    except Exception:
        return f"wrong: {traceback.format_exc()}"
    model, problems = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    found, truth = model.state_dict(), torch.load(folder / models.TRUTH)
    different = [name for name, value in truth.items() if name not in found or not torch.equal(found[name], value)]
    if different or any(problems.values()):
        return f"wrong: {len(different)} of {len(truth)} weights, first {different[:1]}; {problems}"
    return "equal"


def results(ranks: int, names: list[str]) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, names, ranks)
        for name in names:
            yield name, result(folder / name, folder / "out")
            shutil.rmtree(folder / "out", ignore_errors=True)


PROGRAMS = {
    "z0": "DeepSpeed without ZeRO", "z1": "DeepSpeed ZeRO-1", "z2": "DeepSpeed ZeRO-2", "z3": "DeepSpeed ZeRO-3",
    "universal": "DeepSpeed universal", "peft": "PEFT under DeepSpeed", "trainer": "Trainer",
    "accelerate": "Accelerate, FSDP2", "dcp": "torch DCP",
}  # fmt: skip
"""First part of a case's name -> what wrote it."""


def table(found: dict[int, dict[str, str]]) -> str:
    """Markdown: a row for each program and result, with the names of its cases."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for ranks, results_of_cases in found.items():
        for name, value in results_of_cases.items():
            first, _, rest = name.partition("-")
            program, case = (PROGRAMS[first], rest) if first in PROGRAMS else ("torch FSDP and others", name)
            rows.setdefault((program, str(ranks), value.partition("; ")[0]), []).append(case)
    lines = ["| written by | ranks | cases | weights |", "|---|---|---|---|"]
    for (program, number, value), cases in rows.items():
        lines.append(f"| {program} | {number} | {len(cases)}: {', '.join(cases)} | {value} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--only", default="", help="names, or parts of names, of cases")
    parser.add_argument("--write", type=Path, help="page in which to replace the table")
    options = parser.parse_args()
    parts = options.only.split(",")
    names = [name for name in NAMES if any(part in name for part in parts)]
    found = {int(ranks): dict(results(int(ranks), names)) for ranks in options.ranks.split(",")}
    text = table(found)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text)
    verdicts = [(name, value) for rows in found.values() for name, value in rows.items()]
    counts = {kind: sum(value.startswith(kind) for _, value in verdicts) for kind in ("equal", "refused", "wrong")}
    print("RESULT", counts)
    wrong = [item for item in verdicts if item[1].startswith("refused" if item[0] not in TO_REFUSE else "equal")]
    return 1 if counts["wrong"] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
