"""Damages checkpoints in thousands of ways, and opens and reads each, in a process with little memory that may open no other file.

python -m tests.jobs.tensor_io.fuzz FOLDER COUNT     FOLDER/*/ are whole checkpoints, FOLDER/../outside must not be opened
"""

import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import struct
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from conf.errors import UserError
from jobs.tensor_io.layout import blocks
from jobs.tensor_io.open_checkpoint import open_checkpoint
from jobs.tensor_io.reader import OpenFiles, Reader

LIMIT = 2 * 2**30
"""Bytes of address space: a checkpoint of a few kilobytes that asks for more would do so on any machine."""
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, -(2**31), 2**31 - 1, 2**31, 2**40, -(2**63), 2**63, 2**64, 2**1000)
TEXTS = (
    "", ".", "..", "../outside/secret", "../../outside/secret.safetensors", "/etc/passwd", "outside", "a/b", "\0", "x" * 5000,
    "\u2028", "F32", "I64", "float32", "data", "0", "1", "é", "\ud800",
)  # fmt: skip
GLOBALS = (
    "os system",
    "builtins eval",
    "builtins exec",
    "posix system",
    "torch load",
    "subprocess Popen",
    "builtins tuple",
)
CONTROL = (".metadata", "*_states.pt", "*.safetensors", "*.json", "latest")


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change, insert, delete or repeat some bytes, or cut the end off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, length = rng.randrange(len(result) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        action = rng.randrange(5)
        if action == 0:
            result[place : place + length] = rng.randbytes(length)
        elif action == 1:
            result[place:place] = rng.randbytes(length)
        elif action == 2:
            del result[place : place + length]
        elif action == 3:
            result[place : place + length] = b"\xff" * length
        elif rng.random() < 0.2:
            del result[place:]
        else:
            result[place:place] = result[place : place + length]
    return bytes(result)


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Put other numbers, texts, names or opcodes into a pickle that stays well formed otherwise."""
    ops = [(op, argument, place) for op, argument, place in pickletools.genops(data)]
    ends = [place for _, _, place in ops[1:]] + [len(data)]
    kinds = {"number": ("INT", "LONG"), "text": ("UNICODE", "STRING"), "name": ("GLOBAL",), "any": ("",)}
    wanted = rng.choice(("number", "number", "number", "text", "text", "name", "any"))
    found = [index for index, (op, _, _) in enumerate(ops) if any(part in op.name for part in kinds[wanted])]
    if not found:
        return flip(data, rng)
    index = rng.choice(found)
    replacement = b""
    if wanted == "number":
        replacement = pickle.dumps(rng.choice(NUMBERS), 2)[2:-1]
    elif wanted == "text":
        text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        replacement = b"X" + struct.pack("<I", len(text)) + text
    elif wanted == "name":
        replacement = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
    elif rng.random() < 0.5:
        other = rng.randrange(len(ops))
        replacement = data[ops[other][2] : ends[other]]
    return data[: ops[index][2]] + replacement + data[ends[index] :]


def change_archive(path: Path, rng: random.Random) -> None:
    """Change the pickle of a torch.save archive, and give it the right checksums; sometimes compressed, or with short storages."""
    with zipfile.ZipFile(path) as files:
        records = {name: files.read(name) for name in files.namelist()}
    for name in records:
        if name.endswith("data.pkl"):
            records[name] = change_pickle(records[name], rng)
        elif "/data/" in name and rng.random() < 0.1:
            records[name] = records[name][: rng.randrange(len(records[name]) + 1)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED) as files:
        for name, content in records.items():
            files.writestr(name, content)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Put another value into a place of a JSON document."""
    content = json.loads(data)
    node, spots = content, list[tuple[object, object]]()

    def collect(value: object) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            spots.append((value, key))
            collect(value[key])  # type: ignore[index]

    collect(node)
    holder, key = rng.choice(spots)
    value = rng.choice((*NUMBERS, *TEXTS, None, True, 1.5, [], {}, [[[]]], [1, 2, 3]))
    if isinstance(holder, dict) and rng.random() < 0.2:
        holder[rng.choice(TEXTS)] = holder.pop(key)
    else:
        holder[key] = value  # type: ignore[index]
    return json.dumps(content).encode("utf-8", "surrogatepass")


def change_safetensors(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = change_json(data[8 : 8 + length], rng), data[8 + length :]
    path.write_bytes(
        (rng.choice(NUMBERS) % 2**64 if rng.random() < 0.1 else len(header)).to_bytes(8, "little") + header + rest
    )


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint. Returns what was done."""
    paths = sorted(path for pattern in CONTROL for path in folder.rglob(pattern))
    path = rng.choice(paths)
    structured: dict[str, Callable[[], object]] = {
        ".metadata": lambda: path.write_bytes(change_pickle(path.read_bytes(), rng)),
        ".pt": lambda: change_archive(path, rng),
        ".safetensors": lambda: change_safetensors(path, rng),
        ".json": lambda: path.write_bytes(change_json(path.read_bytes(), rng)),
        "latest": lambda: path.write_text(rng.choice(TEXTS), "utf-8", "surrogatepass"),
    }
    kind = path.suffix or path.name
    if rng.random() < 0.05:
        path.unlink()
        path.symlink_to(folder.parent / "outside/secret.safetensors")
    elif rng.random() < 0.6:
        structured[kind]()
    else:
        path.write_bytes(flip(path.read_bytes(), rng))
    return path.name


def read_all(folder: Path) -> int:
    """Open a checkpoint and read all its numbers. Returns how many bytes."""
    checkpoint, files, total = open_checkpoint(folder), OpenFiles(), 0
    reader = Reader(files)
    try:
        for stored in checkpoint.tensors.values():
            for start, stop in blocks(0, stored.numel, stored.width, 2**20):
                block = np.empty((stop - start) * stored.dtype.itemsize, np.uint8)
                reader.fill(stored, start, block)
                total += block.size
    finally:
        files.close()
    return total


def watch_opens(allowed: Path, opened: Counter[str]) -> None:
    """Count what is opened outside `allowed` and the installed code, and every start of a program."""
    code = (sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[3]))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            opened[event] += 1
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((str(allowed), *code)):
                opened[path] += 1

    sys.addaudithook(hook)


def main(seeds: Path, count: int) -> dict[str, object]:
    """Damage and read `count` checkpoints. Returns the counts of what happened."""
    work, happened, opened, failures = seeds.parent / "work", Counter[str](), Counter[str](), list[str]()
    kinds = sorted(path for path in seeds.iterdir() if path.is_dir())
    shutil.copytree(seeds.parent / "outside", work / "outside")
    for folder in kinds:
        assert read_all(folder) > 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    watch_opens((work / "checkpoint").resolve(), opened)
    for number in range(count):
        rng = random.Random(number)
        folder = work / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kinds[number % len(kinds)], folder)
        what = damage(folder, rng)
        opened.clear()
        try:
            read_all(folder)
            happened["read"] += 1
        except UserError as error:
            happened["refused"] += 1
            if "\n" in str(error.problems[0]).strip() or len(str(error)) > 4000:
                failures.append(f"{number} {kinds[number % len(kinds)].name} {what}: message {str(error)[:300]!r}")
        except BaseException:
            failures.append(f"{number} {kinds[number % len(kinds)].name} {what}: {traceback.format_exc()[-600:]}")
        if opened:
            failures.append(f"{number} {kinds[number % len(kinds)].name} {what}: opened {dict(opened)}")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**happened, "failures": failures, "grown_mib": (after - before) // 1024}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
