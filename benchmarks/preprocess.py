"""Measures preprocess against TRL's own preparation and a bare `datasets.map`: tokens per second on one core, and peak memory.

    make bench-data [ARGS="--rounds 5"]       installs TRL beside, and runs this
    python benchmarks/preprocess.py [--chat ROWS] [--text ROWS] [--vocab VOCAB.json --merges MERGES.txt]
                                    [--megabytes 16] [--sizes 10,100] [--rounds 3]

The input is made of the given rows in random order, each time with another number in it, until the file has the given size.
Without given rows it is made of docstrings, see preprocess_inputs.py.
Each program reads raw rows and writes packed tokens to disk. It runs in a process of its own, bound to one core, and the
programs take turns; a ratio is the median of the ratios of all rounds. TRL runs its own functions:
`SFTTrainer._prepare_dataset` (assistant-only loss on chats) with packing "bfd". `datasets.map` only tokenizes, in batches, with
the same tokenizer. Then the script measures the peak memory of preprocess with all its processes for inputs of `--sizes`.

`vs_trl_chat` and `vs_trl_text` compare seconds of work: Muster's are all that `jobs.preprocess.run` does, from loading the
tokenizer to the preview page, and TRL's begin with its tokenizer loaded; imports are left out of both. `..._cpu` compares
seconds of the processor, which other programs on the machine disturb less. `..._process` compares whole processes, with imports.
The cache of Muster is empty each time, and `datasets` has none.

The last line is RESULT with the figures as JSON; without TRL its keys are left out.
"""

import argparse
import importlib.util
import json
import os
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

from benchmarks.preprocess_inputs import save_tokenizer, write_rows  # noqa: E402

ROW = 2048


def config_for(rows: Path, tokenizer_folder: Path, run: Path, *more: str) -> Any:
    import hydra
    from hydra.core.config_store import ConfigStore

    from conf.resolve import resolve
    from conf.schema import Config
    from launcher.check.localize import localize

    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CLONE / "conf")):
        given = [
            f"run_dir={run}",
            f"data.path={rows}",
            f"model.tokenizer={tokenizer_folder}",
            f"data.max_length={ROW}",
            *more,
        ]
        gates = [f"data.gates.{name}=1" for name in ("duplicates", "placeholders", "overlong", "empty")]
        config = resolve(hydra.compose("config", overrides=given + gates))
    localize(config, 0)
    return config


class Clock:
    """Measures from its creation on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds that have passed, and seconds of the processor that this process has used."""
        return {"seconds": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


def muster(rows: Path, tokenizer_folder: Path, run: Path) -> dict[str, float]:
    config = config_for(rows, tokenizer_folder, run, "data.workers=1")
    from jobs import preprocess
    from jobs.data import batches

    clock = Clock()
    preprocess.run(config)
    packed = batches.load_split(run / "data", "train", ROW)
    held_out = batches.load_split(run / "data", "validation")
    tokens = int(packed.lengths.sum() + held_out.lengths.sum())
    return clock.read() | {"tokens": tokens, "fill": float(packed.lengths.sum() / (len(packed) * ROW))}


def trl(rows: Path, tokenizer_folder: Path, run: Path) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat = "messages" in rows.open().readline()
    clock = Clock()
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(run))
    arguments = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=chat, max_length=ROW,
        truncation_mode="keep_start", packing_strategy="bfd", shuffle_dataset=False,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=tokenizer.chat_template if chat else None, completion_only_loss=False
    )
    packed = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, True, None, "train")
    return clock.read() | {"tokens": sum(map(len, packed["input_ids"]))}


def datasets_map(rows: Path, tokenizer_folder: Path, run: Path) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat = "messages" in rows.open().readline()

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = batch["text"] if not chat else tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=not chat)["input_ids"]}

    clock = Clock()
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(run))
    mapped = dataset.map(tokens, batched=True, remove_columns=dataset.column_names)
    return clock.read() | {"tokens": sum(map(len, mapped["input_ids"]))}


PROGRAMS = {"ours": muster, "trl": trl, "datasets_map": datasets_map}


def run_program(name: str, rows: str, tokenizer_folder: str) -> None:
    """Bind this process to one core, run one program, and print its result."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as run:
        result = PROGRAMS[name](Path(rows), Path(tokenizer_folder), Path(run) / "run")
    print("SIDE", json.dumps(result))


def measure(name: str, rows: Path, tokenizer_folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--side", name, str(rows), str(tokenizer_folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.rsplit("SIDE ", 1)[1])
    return result | {"process": time.perf_counter() - began}


def peak_mib(rows: Path, tokenizer_folder: Path) -> float:
    """Peak private memory of preprocess and its workers together in MiB, sampled ten times per second."""
    with tempfile.TemporaryDirectory() as run:
        config = config_for(rows, tokenizer_folder, Path(run) / "run")
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
    """Anonymous memory of all processes of a session, in KiB."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[3]) == session:
                lines = folder.joinpath("status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        except (OSError, IndexError, ValueError):
            continue  # the process has ended
    return total


def compare(kind: str, rows: Path, tokenizer_folder: Path, rounds: int) -> dict[str, float]:
    names = [name for name in PROGRAMS if name != "trl" or importlib.util.find_spec("trl")]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            result = measure(name, rows, tokenizer_folder)
            results[name].append(result)
            print(f"{kind:<5} {name:<13} {result['tokens']:>11,} tokens {result['seconds']:7.1f} s {result['cpu']:7.1f} s cpu "
                  f"{result['process']:7.1f} s process {result['tokens'] / result['seconds'] / 1e6:6.2f} M tokens/s"
                  + (f"  fill {result['fill']:.4%}" if "fill" in result else ""), flush=True)  # fmt: skip
    figures: dict[str, float] = {}
    for name, each in results.items():
        speeds = [result["tokens"] / result["seconds"] for result in each]
        figures[f"{name}_{kind}_tokens_per_s"] = round(statistics.median(speeds))
    for name in names[1:]:
        for key, ending in (("seconds", ""), ("cpu", "_cpu"), ("process", "_process")):
            figures[f"vs_{name}_{kind}{ending}"] = _ratio(results["ours"], results[name], key)
    return figures


def _ratio(ours: list[dict[str, float]], others: list[dict[str, float]], key: str) -> float:
    """How many times as many tokens per second we have: the median of all rounds."""
    pairs = zip(ours, others, strict=True)
    return round(
        statistics.median(mine["tokens"] / mine[key] / (other["tokens"] / other[key]) for mine, other in pairs), 2
    )


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        run_program(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", help="file of rows with instruction, input, output")
    parser.add_argument("--text", help="file of rows with text (or output)")
    parser.add_argument("--vocab")
    parser.add_argument("--merges")
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--sizes", default="10,100", help="MB of the inputs for which peak memory is measured")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    figures: dict[str, Any] = {"megabytes": given.megabytes, "rounds": given.rounds}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder, rows = Path(folder) / "tokenizer", Path(folder) / "rows.jsonl"
        save_tokenizer(tokenizer_folder, given.vocab, given.merges)
        for kind, source in (("chat", given.chat), ("text", given.text)):
            write_rows(source, rows, given.megabytes, kind)
            figures |= compare(kind, rows, tokenizer_folder, given.rounds)
        peaks = {}
        for size in given.sizes.split(","):
            write_rows(given.chat, rows, int(size), "chat")
            peaks[size] = round(peak_mib(rows, tokenizer_folder))
            print(f"peak memory for {size} MB: {peaks[size]} MiB", flush=True)
    packing = subprocess.run(
        [sys.executable, CLONE / "benchmarks/packing.py"], stdout=subprocess.PIPE, text=True, check=True
    )
    packer = json.loads(packing.stdout.rsplit("RESULT ", 1)[1])
    figures |= {key: packer[key] for key in ("packer_vs_trl", "fill") if key in packer}
    print("RESULT", json.dumps(figures | {"peak_mib": peaks}))


if __name__ == "__main__":
    main()
