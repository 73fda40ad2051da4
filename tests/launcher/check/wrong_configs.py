"""Launches wrong and right configs as dry runs, and writes docs/wrong-configs.md: `make wrong-configs`.

wrong_configs.txt and right_configs.txt hold the command lines. A wrong config must be refused with a message that begins with its
key; a right one must not be refused. FILES stands for a folder with the files that they name.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import launch
from conf.files import write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
VERDICTS = ("caught", "let through", "traceback", "misleading")
PAGE = """\
# Configs that are refused

A wrong value should be refused when it is typed, not after a night in the queue. `make wrong-configs` launches the command lines
of `tests/launcher/check/wrong_configs.txt` and `right_configs.txt` as dry runs, in one process for each core, and writes this
page.

- A wrong config is **caught** if the launch ends with exit code 2 and a message that begins with the key that is wrong. It is
  **misleading** if the message names another key, and **let through** if the launch goes on.
- A right config must pass. Each is close to a wrong one, so that a rule which refuses too much is seen.

| | configs |
|---|---|
{counts}

{result}

## One message for each key

`FILES` is a folder with the files that the tests write.

| key | configs | for example | message |
|---|---|---|---|
{rows}
"""
NO_TENSORS = "\x02" + "\0" * 7 + "{}"
"""A safetensors file with the header {}."""
SLURM_SCRIPT = ("cluster=slurm", "cluster.train.nodes=1", "submit=script")


def wrong() -> list[tuple[str, str]]:
    """(key that the message must name, command line) of each wrong config.

    The key stands above its lines, after a #. Those below `# KEY without PACKAGE` are wrong only where that is not installed.
    """
    found, key, package = [], "", ""
    for line in (HERE / "wrong_configs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            key, _, package = line.removeprefix("# ").partition(" without ")
        elif not package or find_spec(package) is None:
            found.append((key, line))
    return found


def right() -> list[str]:
    """Command lines that must not be refused."""
    return (HERE / "right_configs.txt").read_text(encoding="utf-8").splitlines()


def write_files(folder: Path) -> None:
    """Write the files that the command lines name."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    texts = {
        "chats.jsonl": (json.dumps(chat) + "\n") * 20,
        "texts.csv": "text\nhello\nworld\n",
        "prompts.jsonl": '{"prompt": "a"}\n',
        "bad.jsonl": '{"messages": [}\n',
        "columns.jsonl": '{"a": 1, "b": 2}\n',
        "empty.jsonl": "",
        "empty.csv": "",
        "list.jsonl": "[1, 2]\n",
        "columns.csv": "a,b\n1,2\n",
        "no.parquet": "hello",
        "no.jsonl.gz": "hello",
        "rows.pdf": "%PDF",
        "file": "x",
        "good.jinja": "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",
        "bad.jinja": "{% for message in messages %}\n{{ message.content }\n{% endfor %}",
        "encoder/config.json": json.dumps({"model_type": "bert"}),
        "encoder/model.safetensors": NO_TENSORS,
        "gpt2/config.json": json.dumps(
            {"model_type": "gpt2", "vocab_size": 1024, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 1024}
        ),
        "gpt2/model.safetensors": NO_TENSORS,
        "cut/model.safetensors": "{}",
        "cut/config.json": json.dumps({"model_type": "llama", "num_hidden_layers": "2"}),
        "shards/model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}),
        "shards/config.json": json.dumps({"model_type": "llama"}),
        "pointer/model.safetensors": "version https://git-lfs.github.com/spec/v1\n",
        "pointer/config.json": json.dumps({"model_type": "llama"}),
        "dbrx/config.json": json.dumps(
            {"model_type": "dbrx", "vocab_size": 1024, "d_model": 96, "n_layers": 2, "n_heads": 4, "max_seq_len": 4096}
        ),
        "dbrx/model.safetensors": NO_TENSORS,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x01" * 50)
    (folder / "empty").mkdir()
    example = Path(launch.CLONE) / "examples/tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for target in ("gpt2", "dbrx", "plain", "cut", "shards"):
            (folder / target).mkdir(exist_ok=True)
            (folder / target / name).write_bytes((example / name).read_bytes())
    for target in ("gpt2", "dbrx"):
        (folder / target / "chat_template.jinja").write_bytes((example / "chat_template.jinja").read_bytes())
    _write_run(folder / "run")


def _write_run(run: Path) -> None:
    """A run of the demo that has trained 20 steps, and whose data folder is gone."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = launch.main([*SLURM_SCRIPT, f"run_dir={run}"])
    assert code == 0, output.getvalue()
    (run / "checkpoints/step-00000020").mkdir(parents=True)


def outcome(words: str, folder: Path) -> tuple[int | str, str]:
    """The exit code of a dry run (or "traceback"), and what it printed on stderr."""
    output, errors = io.StringIO(), io.StringIO()
    given = shlex.split(words.replace("FILES", str(folder)))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code: int | str = launch.main([*given, "dry_run=true"])
        except BaseException as error:  # anything that a user would see as a traceback
            return "traceback", repr(error)
    return code, errors.getvalue()


def judge(key: str, words: str, folder: Path) -> tuple[str, str]:
    """(caught, let through, traceback or misleading; the message) of a wrong config."""
    code, message = outcome(words, folder)
    if code == "traceback" or "Traceback" in message:
        return "traceback", message
    if code == 0:
        return "let through", message
    names = [re.split(r"[=:]", line.removeprefix("launch.py: "))[0] for line in message.splitlines()]
    is_clear = code == 2 and key in names and len(message) > len(key) + 20
    return ("caught" if is_clear else "misleading"), message


Judged = tuple[str, str, str, str]
"""Key, command line, verdict and message of a wrong config."""


def judge_all(folder: Path, processes: int) -> tuple[list[Judged], list[tuple[str, str]]]:
    """(every wrong config with its verdict, each right config that was refused with the message)."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:  # the imports take longer than a launch
        verdicts = pool.starmap(functools.partial(judge, folder=folder), wrong(), chunksize=4)
        outcomes = pool.map(functools.partial(outcome, folder=folder), right(), chunksize=4)
    judged = [(*each, *verdict) for each, verdict in zip(wrong(), verdicts, strict=True)]
    refused = [(words, message) for words, (code, message) in zip(right(), outcomes, strict=True) if code != 0]
    return judged, refused


def result(judged: Sequence[Judged], refused: int, passed: int) -> str:
    """The last line of the output."""
    count = Counter(verdict for *_, verdict, _ in judged)
    counts = " ".join(f"{verdict.replace(' ', '_')}={count[verdict]}" for verdict in VERDICTS)
    return f"RESULT wrong={len(judged)} {counts} right={passed + refused} passed={passed} refused={refused}"


def page(judged: Sequence[Judged], refused: int, passed: int) -> str:
    """The text of docs/wrong-configs.md: the counts, and the first command line of each key with its message."""
    count = Counter(verdict for *_, verdict, _ in judged)
    counts = [("wrong", len(judged)), *((f"... {verdict}", count[verdict]) for verdict in VERDICTS)]
    counts += [("right", passed + refused), ("... passed", passed), ("... refused", refused)]
    by_key: dict[str, list[Judged]] = {}
    for each in judged:
        by_key.setdefault(each[0], []).append(each)
    rows = [
        f"| `{key}` | {len(group)} | {_code(group[0][1])} | {_cell(_line_of(key, group[0][3]))} |"
        for key, group in by_key.items()
    ]
    return PAGE.format(
        counts="\n".join(f"| {name} | {number} |" for name, number in counts),
        rows="\n".join(rows),
        result=result(judged, refused, passed),
    )


def _line_of(key: str, message: str) -> str:
    """The line of a message that begins with the key; the first one if none does."""
    lines = [line.removeprefix("launch.py: ") for line in message.splitlines()]
    return next((line for line in lines if line.startswith(key)), lines[0] if lines else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _code(words: str) -> str:
    return f"`{words}`".replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each config that is judged wrongly, and the counts; write the page. Returns 1 if one is judged wrongly."""
    parser = argparse.ArgumentParser(prog="python -m tests.launcher.check.wrong_configs", description=__doc__)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/wrong-configs.md", help="page to write")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    target = options.page.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        os.chdir(folder)
        write_files(folder)
        judged, refused = judge_all(folder, options.processes)
        for _, words, verdict, message in judged:
            if verdict != "caught":
                print(f"{verdict}: {words}\n    {message.strip()}")
        for words, message in refused:
            print(f"refused, though right: {words}\n    {message.strip()}")
        passed = len(right()) - len(refused)
        write_text(
            target, page(judged, len(refused), passed).replace(str(folder), "FILES").replace(str(ROOT) + "/", "")
        )
        os.chdir(ROOT)
    print(result(judged, len(refused), passed))
    return 1 if refused or any(verdict != "caught" for *_, verdict, _ in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
