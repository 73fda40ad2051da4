"""Tokenized sets: the same bytes after any interruption, one build for all runs, and never a stale set."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conf.errors import DataError, SiteError
from conf.files import read_json
from jobs import preprocess
from jobs.data import batches, cache, cache_key, cache_trust, sources, token_dataset
from tests.jobs.ranks import CLONE

ROWS = [
    {"instruction": f"Say {n}, please.", "input": "", "output": f"It is {n}. " * (1 + n * 7 % 30)} for n in range(2000)
]
PROGRAM = """
import sys
from pathlib import Path
from conf.resolve import load
from jobs import preprocess
from jobs.data import cache, sources

if __name__ == "__main__":
    cache.PART_TOKENS, sources.CHUNK = 20_000, 2**13
    preprocess.run(load(Path(sys.argv[1])))
"""


@pytest.fixture
def config(compose, tmp_path: Path):
    """A config for `ROWS`; takes further overrides."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def composed(*words, run="run"):
        return compose(f"run_dir={tmp_path}/{run}", f"data.path={path}", *words)

    return composed


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "PART_TOKENS", 20_000)
    monkeypatch.setattr(sources, "CHUNK", 2**13)


def contents(folder):
    """The bytes of every file of the only set in a cache, by file name."""
    (set_folder,) = (path for path in folder.iterdir() if (path / "set.json").exists())
    return {
        str(path.relative_to(set_folder)): path.read_bytes() for path in sorted(set_folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def program(tmp_path: Path, config):
    """Starts preprocess as a process of its own."""
    from conf.resolve import save

    (tmp_path / "program.py").write_text(PROGRAM)

    def started(run, *words):
        save(config(*words, run=run), tmp_path / f"{run}.yaml")
        with (tmp_path / f"{run}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, tmp_path / "program.py", tmp_path / f"{run}.yaml"],
                cwd=CLONE,
                env=os.environ | {"PYTHONPATH": str(CLONE)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    return started


@pytest.fixture
def log_of(tmp_path: Path):
    return lambda run: (tmp_path / f"{run}.log").read_text()


def test_an_interrupted_build_gives_the_same_bytes(
    config, small_parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess.run(config("data.workers=1", f"data.cache={tmp_path}/whole"))
    read_blocks, rng = sources.read_blocks, random.Random(0)
    parts = []
    for _ in range(4):
        stop_at = rng.randrange(5, 30)

        def interrupted(*given, stop_at=stop_at):
            for number, block in enumerate(read_blocks(*given)):
                if number == stop_at:
                    raise KeyboardInterrupt
                yield block

        monkeypatch.setattr(sources, "read_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess.run(config("data.workers=1", f"data.cache={tmp_path}/broken", run="broken"))
        parts.append(len(list((tmp_path / "broken").glob(".*.*-*/part-*"))))
    monkeypatch.setattr(sources, "read_blocks", read_blocks)
    preprocess.run(config("data.workers=1", f"data.cache={tmp_path}/broken", run="broken"))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert max(parts) > 0
    assert parts == sorted(parts)  # no complete part is built again


@pytest.mark.slow
@pytest.mark.proof
def test_a_build_that_is_killed_at_random_moments_gives_the_same_bytes(program, log_of, tmp_path: Path) -> None:
    began = time.monotonic()
    assert program("whole", "data.workers=2", f"data.cache={tmp_path}/whole").wait(120) == 0, log_of("whole")
    seconds = time.monotonic() - began
    rng, killed = random.Random(1), 0
    for _ in range(3):
        process = program("run", "data.workers=2", f"data.cache={tmp_path}/broken")
        time.sleep(seconds * rng.uniform(0.5, 1))
        if process.poll() is None:
            killed += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = program("run", "data.workers=1", f"data.cache={tmp_path}/broken")
    assert process.wait(120) == 0, log_of("run")
    assert killed > 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_runs_that_start_together_build_once(program, log_of, tmp_path: Path) -> None:
    both = [program(run, "data.workers=1", f"data.cache={tmp_path}/cache") for run in ("one", "two")]
    assert [process.wait(120) for process in both] == [0, 0], log_of("one") + log_of("two")
    assert sum("tokenize: 100%" in log_of(run) for run in ("one", "two")) == 1
    assert [path.name for path in (tmp_path / "cache").glob(".*.*-*")] == []
    assert len({(tmp_path / run / "data/sets/sample").resolve() for run in ("one", "two")}) == 1


def test_several_workers_give_the_same_bytes_as_one(config, small_parts, tmp_path: Path) -> None:
    for workers in (1, 3):
        preprocess.run(config(f"data.workers={workers}", f"data.cache={tmp_path}/{workers}", run=f"run{workers}"))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def key_of(config):
    tokenizer = preprocess.load_tokenizer(config)
    (dataset,) = preprocess.datasets.training(config.data).values()
    return cache_key.compute_key(dataset, config.data, tokenizer, "alpaca", preprocess.Path(config.run_dir) / "cache")


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("data.max_length=99", False),
        ("data.mask=all", False),
        ("data.overlong=drop", False),
        ("data.max_rows=7", False),
        ("data.split='[:50%]'", False),
        ("data.chat_template=chatml", False),
        ("data.seed=1", True),
        ("data.packing=true", True),
        ("data.validation_fraction=0.5", True),
        ("data.gates.empty=1", True),
        ("data.workers=2", True),
        ("train.global_batch=8", True),
    ],
)
def test_the_key_changes_only_with_settings_that_decide_tokens(word, same, config) -> None:
    assert (key_of(config()) == key_of(config(word))) is same


def test_the_key_depends_on_the_content_of_a_file_not_its_name_or_time(config, tmp_path: Path) -> None:
    first = key_of(config())
    path = tmp_path / "rows.jsonl"
    path.rename(tmp_path / "other.jsonl")
    assert key_of(config(f"data.path={tmp_path}/other.jsonl")) == first
    text = (tmp_path / "other.jsonl").read_text()
    before = (tmp_path / "other.jsonl").stat()
    (tmp_path / "other.jsonl").write_text(text.replace("Say 7,", "Say 8,"))
    os.utime(tmp_path / "other.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -t does
    assert key_of(config(f"data.path={tmp_path}/other.jsonl")) != first


def test_a_known_file_is_not_hashed_again(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_key, "SETTLED_S", -1)
    first = key_of(config())
    monkeypatch.setattr(cache_key, "_sha256", lambda file: pytest.fail(f"{file} was read again"))
    assert key_of(config()) == first


def test_another_run_uses_the_cached_set(config, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess.run(config())
    preprocess.run(config("data.seed=5", "data.packing=true", run="other"))
    assert "already in the cache" in capsys.readouterr().out


def test_deleted_tokens_are_an_error_with_a_remedy(config, tmp_path: Path) -> None:
    preprocess.run(config(f"data.cache={tmp_path}/cache"))
    os.rename(tmp_path / "cache", tmp_path / "gone")
    with pytest.raises(DataError, match="preprocess again") as caught:
        batches.load_split(tmp_path / "run/data", "train")
    remedy = re.search(r"again: (rm -r \S+ \S+), then muster resume (\S+)", str(caught.value))
    (tmp_path / "run/jobs/preprocess").mkdir(parents=True)
    subprocess.run(remedy[1], shell=True, check=True)
    assert remedy[2] == str(tmp_path / "run")
    assert not (tmp_path / "run/jobs/preprocess").exists(), "else the launcher would take the job for done"
    preprocess.run(config(f"data.cache={tmp_path}/cache"))
    assert len(batches.load_split(tmp_path / "run/data", "train"))


def test_every_sample_has_the_location_of_its_row(config, tmp_path: Path) -> None:
    preprocess.run(config("data.max_rows=50"))
    set_folder = tmp_path / "run/data/sets/sample"
    dataset = token_dataset.open_sets([set_folder])
    locations = token_dataset.row_locations(set_folder, range(len(dataset)))
    assert locations == [f"{tmp_path}/rows.jsonl:{n + 1}" for n in range(50)]


def test_rows_that_are_left_out_count_as_rows(config, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"instruction": "a", "output": ""}\nno row\n')
    preprocess.run(config("data.gates.empty=0.01", "data.gates.unreadable=0.01"))
    counts = read_json(tmp_path / "run/data/data.json")["sets"]["sample"]
    assert (counts["rows"], counts["samples"]) == (2002, 2000)


def test_the_splits_have_every_sample_once(config, tmp_path: Path) -> None:
    preprocess.run(config())
    train, held = (
        batches.load_split(tmp_path / "run/data", "train"),
        batches.load_split(tmp_path / "run/data", "validation"),
    )
    assert np.array_equal(np.sort(np.concatenate([train.chosen, held.chosen])), np.arange(2000))
    assert 60 < len(held) < 140


def test_the_key_does_not_depend_on_the_last_call_of_the_tokenizer(config) -> None:
    tokenizer = preprocess.load_tokenizer(config())
    first = cache_key._hash_tokenizer(tokenizer)
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    assert cache_key._hash_tokenizer(tokenizer) == first
    assert tokenizer.backend_tokenizer.truncation is not None
    tokenizer.add_tokens(["<extra>"])
    assert cache_key._hash_tokenizer(tokenizer) != first


@pytest.mark.site(
    case="everyone may write to the cache of tokens",
    before="training used whatever lay in it",
    after="refused, with the mode and a remedy",
)
@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o757, 0o702])
def test_a_cache_that_everyone_can_write_to_is_refused(tmp_path, bits) -> None:
    folder = tmp_path / "cache"
    cache_trust.check(folder)  # not there yet
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(SiteError, match=f"data.cache={folder}: everyone may write to it .mode {bits:o}."):
        cache_trust.check(folder)
    folder.chmod(0o770)
    cache_trust.check(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_cache_that_somebody_made_in_a_shared_folder_is_refused(tmp_path) -> None:
    (tmp_path / "shared/.data").mkdir(parents=True)
    os.chown(tmp_path / "shared/.data", 65534, 65534)
    cache_trust.check(tmp_path / "shared/.data")  # a colleague's, in the folder of a group
    (tmp_path / "shared").chmod(0o1777)
    with pytest.raises(SiteError, match="belongs to another user"):
        cache_trust.check(tmp_path / "shared/.data")
