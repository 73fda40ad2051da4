"""launcher/submit/snapshot.py: jobs run a complete copy of the code, and its commit is recorded."""

import subprocess
from pathlib import Path

import pytest

from launcher.submit import snapshot
from tests.conftest import Programs, tool

PROGRAMS = {"for_programs/muster/a.py": "first\n"}
"""What a program of the user can import."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A small clone with the folders that are copied, caches, and other files."""
    for part in (*snapshot.COPIED_FOLDERS, "conf/__pycache__", "docs", ".git", "muster/_bundle"):
        (tmp_path / "clone" / part).mkdir(parents=True)
    for name in (
        "conf/a.py",
        "conf/__pycache__/a.pyc",
        "conf/.a.py.swp",
        "docs/b.md",
        "launch.py",
        "muster/a.py",
        "muster/py.typed",
    ):
        (tmp_path / "clone" / name).write_text("first\n")
    return tmp_path / "clone"


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_folders_that_jobs_need_are_copied(clone: Path, tmp_path: Path) -> None:
    snapshot.copy_code(clone, tmp_path)
    assert files(tmp_path / "code") == {"conf/a.py": "first\n"} | PROGRAMS
    assert {path.name for path in (tmp_path / "code").iterdir()} == {*snapshot.COPIED_FOLDERS, "for_programs"}


def test_a_copy_does_not_change_with_the_clone(clone: Path, tmp_path: Path) -> None:
    snapshot.copy_code(clone, tmp_path)
    (clone / "conf/a.py").write_text("second\n")
    assert files(tmp_path / "code") == {"conf/a.py": "first\n"} | PROGRAMS


def test_a_new_copy_replaces_the_old_one(clone: Path, tmp_path: Path) -> None:
    snapshot.copy_code(clone, tmp_path)
    (clone / "conf/a.py").rename(clone / "conf/b.py")
    snapshot.copy_code(clone, tmp_path)
    assert files(tmp_path / "code") == {"conf/b.py": "first\n"} | PROGRAMS
    assert {path.name for path in tmp_path.iterdir()} == {"clone", "code"}


def test_the_commit_and_the_diff_are_recorded(clone: Path, tmp_path: Path, programs: Programs) -> None:
    (programs() / "git").symlink_to(tool("git"))
    (clone / ".git").rmdir()

    def git(*words: str) -> str:
        command = [tool("git"), "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(clone), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    assert snapshot.provenance(clone, tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (clone / "conf/a.py").write_text("second\n")
    assert snapshot.provenance(clone, tmp_path)["modified"] is True
    assert "+second" in (tmp_path / "code.diff").read_text()


def test_without_git_nothing_is_recorded(clone: Path, tmp_path: Path, programs: Programs) -> None:
    programs()
    assert snapshot.provenance(clone, tmp_path) == {}


TOKEN = "hf_" + "aB3" * 10
KEY = "-----BEGIN PRIVATE KEY-----\nMIIsecretbody\n-----END PRIVATE KEY-----\n"


@pytest.mark.site(
    case="a changed file of the clone holds a token",
    before="it went into code.diff of the run",
    after="it is hidden there, and a message names file and line",
)
def test_secrets_of_a_diff_are_hidden_and_named(
    clone: Path, tmp_path: Path, programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (programs() / "git").symlink_to(tool("git"))
    monkeypatch.setenv("MY_TOKEN", "plain words 1")
    (clone / ".git").rmdir()
    (clone / "conf/key.pem").write_text("none\n")

    def git(*words: str) -> None:
        command = [tool("git"), "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(clone), *words]
        subprocess.run(command, check=True, capture_output=True, timeout=20)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    (clone / "conf/a.py").write_text(
        f"first\nsecond\nlogin('{TOKEN}')\nsay('plain words 1')\nrevision = '{'ab' * 20}'\n"
    )
    (clone / "conf/key.pem").write_text(KEY)
    (clone / "docs/b.md").write_bytes(b"caf\xe9\n")
    snapshot.copy_code(clone, tmp_path)
    assert snapshot.provenance(clone, tmp_path)["modified"] is True
    diff = (tmp_path / "code.diff").read_text()
    assert "+second" in diff
    assert "ab" * 20 in diff, "a commit is no secret"
    assert not [secret for secret in (TOKEN, "plain words 1", "MIIsecretbody") if secret in diff]
    assert "conf/a.py line 3, conf/a.py line 4, conf/key.pem line 1" in capsys.readouterr().err
    assert (tmp_path / "code/conf/a.py").stat().st_mode & 0o777 == 0o600
