"""Launches wrong and right configs as dry runs, and prints which of them are refused: `make wrong-configs`.

wrong_configs.txt and right_configs.txt hold the command lines. A wrong config must be refused with a message that begins with its
key; a right one must not be refused. FILES stands for a folder with the files that they name.
"""

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

import launch

HERE = Path(__file__).parent
SLURM_SCRIPT = ("cluster=slurm", "cluster.train.nodes=1", "submit=script")


def wrong() -> list[tuple[str, str]]:
    """(key that the message must name, command line) of each wrong config. The key stands above its lines, after a #."""
    found, key = [], ""
    for line in (HERE / "wrong_configs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            key = line.removeprefix("# ")
        elif line:
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
        "list.jsonl": "[1, 2]\n",
        "columns.csv": "a,b\n1,2\n",
        "no.parquet": "hello",
        "no.jsonl.gz": "hello",
        "rows.pdf": "%PDF",
        "file": "x",
        "good.jinja": "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",
        "bad.jinja": "{% for message in messages %}\n{{ message.content }\n{% endfor %}",
        "encoder/config.json": json.dumps({"model_type": "bert"}),
        "encoder/model.safetensors": "",
        "gpt2/config.json": json.dumps(
            {"model_type": "gpt2", "vocab_size": 1024, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 1024}
        ),
        "gpt2/model.safetensors": "",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x01" * 50)
    (folder / "empty").mkdir()
    example = Path(launch.CLONE) / "examples/tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for target in ("gpt2", "plain"):
            (folder / target).mkdir(exist_ok=True)
            (folder / target / name).write_bytes((example / name).read_bytes())
    (folder / "gpt2/chat_template.jinja").write_bytes((example / "chat_template.jinja").read_bytes())
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
    names = [line.removeprefix("launch.py: ").split(": ")[0].split("=")[0] for line in message.splitlines()]
    is_clear = code == 2 and key in names and len(message) > len(key) + 20
    return ("caught" if is_clear else "misleading"), message


def main() -> int:
    """Print a line for each config that is judged wrongly, and the table. Returns 1 if there is one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        write_files(folder)
        verdicts = Counter[str]()
        for key, words in wrong():
            verdict, message = judge(key, words, folder)
            verdicts[verdict] += 1
            if verdict != "caught":
                print(f"{verdict}: {words}\n    {message.strip()}", flush=True)
        refused = {words: message for words in right() for code, message in [outcome(words, folder)] if code != 0}
        for words, message in refused.items():
            print(f"refused, though right: {words}\n    {message.strip()}")
    print(f"{verdicts.total()} wrong configs")
    for verdict in ("caught", "let through", "traceback", "misleading"):
        print(f"  {verdict:<12} {verdicts[verdict]}")
    count = len(right())
    print(f"{count} right configs\n  {'passed':<12} {count - len(refused)}\n  {'refused':<12} {len(refused)}")
    return 1 if refused or verdicts.total() != verdicts["caught"] else 0


if __name__ == "__main__":
    sys.exit(main())
