"""conf/files.py: files and folders are complete or absent, also if the writer is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf import files
from tests.conftest import ROOT

WRITE_TEXT = """
import sys, pathlib
from conf.files import write_text
print("go", flush=True)
for number in range(10**9):
    write_text(pathlib.Path(sys.argv[1]), f"{number}\\n" * 200_000)
"""
NEW_FOLDER = """
import sys, pathlib
from conf.files import new_folder
print("go", flush=True)
for number in range(10**9):
    with new_folder(pathlib.Path(sys.argv[1]).with_name(f"folder-{number}")) as unfinished:
        for part in range(10):
            (unfinished / str(part)).write_text(f"{number}\\n" * 2_000)
"""


def kill_while_it_writes(program: str, path: Path, after_s: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout
    with writer.stdout as output:
        assert output.readline() == b"go\n"
    time.sleep(after_s)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL, "the writer ended by itself"


_random = random.Random(7)
MOMENTS = [_random.uniform(0, 0.06) for _ in range(15)]


def test_a_killed_writer_leaves_the_old_text_or_the_new(tmp_path: Path) -> None:
    path, seen = tmp_path / "text", set()
    for moment in MOMENTS:
        kill_while_it_writes(WRITE_TEXT, path, moment)
        if path.exists():
            lines = path.read_text().splitlines()
            assert len(lines) == 200_000
            assert len(set(lines)) == 1
            seen.add(lines[0])
    assert seen, "every writer was killed before its first file: this test shows nothing"


def test_a_killed_writer_leaves_whole_folders_or_none(tmp_path: Path) -> None:
    for number, moment in enumerate(MOMENTS):
        # a folder of ten files takes 70 ms on a busy machine, most of it in fsync
        kill_while_it_writes(NEW_FOLDER, tmp_path / f"{number}/folder", 5 * moment)
    folders = list(tmp_path.glob("*/folder-*"))
    assert folders, "every writer was killed before its first file: this test shows nothing"
    for folder in folders:
        line = folder.name.removeprefix("folder-") + "\n"
        assert {path.name: path.read_text() for path in folder.iterdir()} == {str(i): line * 2_000 for i in range(10)}


def test_a_new_text_replaces_the_old_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    for text in ("a longer text\n", "short: ü\n"):
        files.write_text(tmp_path / "new/text", text)
        assert (tmp_path / "new/text").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text"]


@pytest.mark.site(
    case="A group shares runs, with umask 002 or 027",
    before="every file of a run was closed to the group, whatever the umask",
    after="files follow the umask; only secrets are closed",
)
@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077], ids=oct)
@pytest.mark.parametrize("mode", [0o600, files.EVERYONE, files.PROGRAM], ids=oct)
def test_a_file_follows_the_umask(tmp_path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "text", "", mode=mode)
    finally:
        os.umask(before)
    assert (tmp_path / "text").stat().st_mode & 0o777 == mode & ~umask


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "text", "new \udc80")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"text": "old"}


def test_json_is_read_back_and_absent_is_none(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"path": tmp_path, "steps": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"path": str(tmp_path), "steps": [1, None]}
    assert files.read_json(tmp_path / "b.json") is None


def test_a_folder_does_not_exist_before_its_block_ends(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "a/folder") as unfinished:
        (unfinished / "file").touch()
        assert not (tmp_path / "a/folder").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["folder", "file"]


def test_a_folder_whose_block_raises_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "file").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_writer_are_not_in_the_next_folder(tmp_path: Path) -> None:
    files.partial(tmp_path / "folder").mkdir()
    (files.partial(tmp_path / "folder") / "old").touch()
    with files.new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_a_complete_folder_is_never_replaced(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "first").touch()
    with pytest.raises(FileExistsError, match="folder already exists"), files.new_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "first"]


def test_publish_refuses_to_replace(tmp_path: Path) -> None:
    for folder in (tmp_path / "folder", files.partial(tmp_path / "folder")):
        folder.mkdir()
    with pytest.raises(FileExistsError, match="folder already exists"):
        files.publish(tmp_path / "folder")
    assert files.partial(tmp_path / "folder").exists()


def test_a_folder_with_links_and_folders_can_be_published(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner/file").touch()
        (unfinished / "dangling").symlink_to("nowhere")
    assert (tmp_path / "folder/inner/file").exists()
    assert (tmp_path / "folder/dangling").is_symlink()
