"""Tokens a second on one core, from raw rows to packed tokens on disk: ours, TRL's own preparation, and a bare `datasets.map`.

    python benchmarks/preprocess.py [--chat ROWS] [--text ROWS] [--vocab VOCAB.json --merges MERGES.txt]
                                    [--megabytes 8] [--sizes 10,100,1000] [--rounds 3]

Rows are repeated in random order, each time with other numbers, until a file has so many megabytes. Every side is a process
of its own, tied to one core, and runs in turn with the others; a ratio is the median of those of each round. TRL's functions
are its own: `SFTTrainer._prepare_dataset` (assistant-only loss on chats) with packing "bfd". `datasets.map` only tokenises,
in batches, with the same tokenizer. Then the peak memory of preprocess, its processes added up, for inputs of `--sizes`.
The last line is RESULT; the keys of TRL are there where TRL is installed.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CLONE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CLONE))
CHATML = CLONE / "jobs/tokenization/chat_templates/chatml.jinja"
ROW = 2048


def tokenizer_at(folder: Path, vocab: str | None, merges: str | None) -> None:
    """The bundled tokenizer, or a byte-level one of these files that speaks ChatML."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    if vocab and merges:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        known = json.loads(Path(vocab).read_text())
        lines = [line.split(" ") for line in Path(merges).read_text().splitlines()[1:]]
        bpe = Tokenizer(models.BPE(known, [(left, right) for left, right in lines if left + right in known]))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        words = PreTrainedTokenizerFast(tokenizer_object=bpe)
        words.add_special_tokens(
            {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
        )
    words.chat_template = CHATML.read_text()
    words.save_pretrained(folder)


def grown(source: str, target: Path, megabytes: int, kind: str) -> None:
    """Rows of a file, again and again, each a little different, until the file is so large."""
    text = Path(source).read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    chance, size = random.Random(0), 0
    with target.open("w") as file:
        while size < megabytes * 1e6:
            row = chance.choice(rows)
            number = chance.randrange(10**6)
            if kind == "text":
                line = json.dumps({"text": f"{number} {row.get('text') or row['output']}"})
            else:
                asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
                turns = [
                    {"role": "user", "content": f"{asked} ({number})"},
                    {"role": "assistant", "content": row["output"]},
                ]
                line = json.dumps({"messages": turns})
            size += file.write(line + "\n")


def config_for(rows: Path, words: Path, run: Path, *more: str) -> Any:
    import hydra
    from hydra.core.config_store import ConfigStore

    from conf.resolve import resolve
    from conf.schema import Config
    from launcher.check.localize import localise

    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CLONE / "conf")):
        given = [f"run_dir={run}", f"data.path={rows}", f"model.tokenizer={words}", f"data.max_length={ROW}", *more]
        gates = [f"data.gates.{name}=1" for name in ("duplicates", "placeholders", "overlong", "empty")]
        config = resolve(hydra.compose("config", overrides=given + gates))
    localise(config, 0)
    return config


def ours(rows: Path, words: Path, run: Path) -> dict[str, float]:
    config = config_for(rows, words, run, "data.workers=1")
    from jobs import preprocess
    from jobs.data import batches

    began = time.perf_counter()
    preprocess.run(config)
    packed = batches.load_split(run / "data", "train", ROW)
    held = batches.load_split(run / "data", "validation")
    seconds = time.perf_counter() - began
    tokens = int(packed.lengths.sum() + held.lengths.sum())
    return {"seconds": seconds, "tokens": tokens, "fill": float(packed.lengths.sum() / (len(packed) * ROW))}


def trl(rows: Path, words: Path, run: Path) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    datasets.disable_caching()
    found = AutoTokenizer.from_pretrained(words)
    chat = "messages" in rows.open().readline()
    began = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(run))
    arguments = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=chat, max_length=ROW,
        truncation_mode="keep_start", packing_strategy="bfd", shuffle_dataset=False,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _tokenizer=found, chat_template=found.chat_template if chat else None, completion_only_loss=False
    )
    packed = SFTTrainer._prepare_dataset(trainer, dataset, found, arguments, True, None, "train")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(map(len, packed["input_ids"]))}


def datasets_map(rows: Path, words: Path, run: Path) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    found = AutoTokenizer.from_pretrained(words)
    chat = "messages" in rows.open().readline()

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = batch["text"] if not chat else found.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": found(texts, add_special_tokens=not chat)["input_ids"]}

    began = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(run))
    made = dataset.map(tokens, batched=True, remove_columns=dataset.column_names)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(map(len, made["input_ids"]))}


SIDES = {"ours": ours, "trl": trl, "datasets_map": datasets_map}


def one_side(side: str, rows: str, words: str) -> None:
    """In a process of its own: one core, one result."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as run:
        found = SIDES[side](Path(rows), Path(words), Path(run) / "run")
    print("SIDE", json.dumps(found))


def measured(side: str, rows: Path, words: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--side", side, str(rows), str(words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rsplit("SIDE ", 1)[1])


def peak_mib(rows: Path, words: Path) -> float:
    """Of preprocess and its workers together, sampled ten times a second: private memory, in MiB."""
    with tempfile.TemporaryDirectory() as run:
        config = config_for(rows, words, Path(run) / "run")
        from conf.resolve import save

        save(config, Path(run) / "config.yaml")
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "preprocess", f"{run}/config.yaml"],
            cwd=CLONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        highest = 0
        while process.poll() is None:
            highest = max(highest, _private_kib(process.pid))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit("preprocess failed")
    return highest / 1024


def _private_kib(session: int) -> int:
    """Anonymous memory of all processes of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[3]) == session:
                lines = folder.joinpath("status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        except (OSError, IndexError, ValueError):
            continue  # gone meanwhile
    return total


def compared(kind: str, rows: Path, words: Path, rounds: int) -> dict[str, float]:
    sides = [side for side in SIDES if side != "trl" or importlib.util.find_spec("trl")]
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found = measured(side, rows, words)
            taken[side].append(found["tokens"] / found["seconds"])
            print(f"{kind:<5} {side:<13} {found['tokens']:>11,} tokens {found['seconds']:7.1f} s "
                  f"{taken[side][-1] / 1e6:6.2f} M tokens/s" + (f"  fill {found['fill']:.4%}" if "fill" in found else ""),
                  flush=True)  # fmt: skip
    figures = {f"{side}_{kind}_tokens_per_s": round(statistics.median(speeds)) for side, speeds in taken.items()}
    for side in sides[1:]:
        ratios = [mine / theirs for mine, theirs in zip(taken["ours"], taken[side], strict=True)]
        figures[f"vs_{side}_{kind}"] = round(statistics.median(ratios), 2)
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        one_side(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--chat", default=str(CLONE / "examples/sample.jsonl"), help="rows of instruction, input, output"
    )
    parser.add_argument("--text", default=str(CLONE / "examples/sample.jsonl"), help="rows of text (or output)")
    parser.add_argument("--vocab")
    parser.add_argument("--merges")
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--sizes", default="10,100,1000", help="MB of the inputs whose peak memory is taken")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    figures: dict[str, Any] = {"megabytes": given.megabytes, "rounds": given.rounds}
    with tempfile.TemporaryDirectory() as folder:
        words, rows = Path(folder) / "tokenizer", Path(folder) / "rows.jsonl"
        tokenizer_at(words, given.vocab, given.merges)
        for kind, source in (("chat", given.chat), ("text", given.text)):
            grown(source, rows, given.megabytes, kind)
            figures |= compared(kind, rows, words, given.rounds)
        peaks = {}
        for size in given.sizes.split(","):
            grown(given.chat, rows, int(size), "chat")
            peaks[size] = round(peak_mib(rows, words))
            print(f"peak memory of {size} MB: {peaks[size]} MiB", flush=True)
    packing = subprocess.run(
        [sys.executable, CLONE / "benchmarks/packing.py"], stdout=subprocess.PIPE, text=True, check=True
    )
    packer = json.loads(packing.stdout.rsplit("RESULT ", 1)[1])
    figures |= {key: packer[key] for key in ("packer_vs_trl", "fill") if key in packer}
    print("RESULT", json.dumps(figures | {"peak_mib": peaks}))


if __name__ == "__main__":
    main()
