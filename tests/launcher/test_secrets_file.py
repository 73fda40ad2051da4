"""launcher/secrets_file.py: what a file of secrets may look like, and who may read it."""

import os
from pathlib import Path

import pytest

from conf.errors import SiteError
from launcher import secrets_file

PATH = Path("/home/me/secrets")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("A=1\nB=2\n", {"A": "1", "B": "2"}),
        ("export A=1\r\nexport  B=2\r\n", {"A": "1", "B": "2"}),
        ("A=1\rB=2\r", {"A": "1", "B": "2"}),
        ("# x\n\n A = 1 \n", {"A": "1"}),
        ("A=a=b==\n", {"A": "a=b=="}),
        ("A='it is'\nB=\"so\"\n", {"A": "it is", "B": "so"}),
        ("A='$x `y` \\ \"z\"'\n", {"A": '$x `y` \\ "z"'}),
        (r'A="a\"b\\c\$d"', {"A": 'a"b\\c$d'}),
        ("A='1' # the first\n", {"A": "1"}),
        ("A=a#b\n", {"A": "a#b"}),
        ("A=pa$$\n", {"A": "pa$$"}),
        ("A=1\nA=2\n", {"A": "2"}),
        ("A=é日本\n", {"A": "é日本"}),
        ("A=a'b\n", {"A": "a'b"}),
    ],
)
def test_lines_are_read_as_a_shell_reads_them(text: str, values: dict[str, str]) -> None:
    assert secrets_file.parse(PATH, text) == (values, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\nHF_TOKEN\n", "line 2 is not of the form NAME=value"),
        ("export HF_TOKEN\n", "line 1 is not of the form NAME=value"),
        ("A-B=secret1\n", "line 1 is not of the form NAME=value"),
        ("A=\n", "line 1 (A) has no value"),
        ("A=''\n", "line 1 (A) has no value"),
        ("A='secret1\n", "line 1 (A) has a quote that is not closed"),
        ("A='secret1' secret1\n", "line 1 (A) has a quote that is not closed, or text after it"),
        ("A=secret1 # x\n", "line 1 (A) has a blank and #"),
        ("A=$secret1\n", "line 1 (A) has $ or `"),
        ('A="$(cat secret1)"\n', "line 1 (A) has $ or `"),
        ("A=sec\0ret1\n", "line 1 (A) has a control character"),
        ("A=sec\u2028ret1\n", "line 1 (A) has a control character"),
    ],
)
def test_another_line_is_named_without_its_value(text: str, message: str) -> None:
    values, [problem] = secrets_file.parse(PATH, text)
    assert str(problem).startswith(f"cluster.secrets_file={PATH}: {message}")
    assert "secret1" not in str(problem)
    assert set(values) <= {"A"}


@pytest.mark.parametrize(
    "content", [b"A=\xc3\xa9\n", b"\xef\xbb\xbfA=\xc3\xa9\n", "A=é\n".encode("utf-16"), b"\xfe\xff" + "A=é\n".encode("utf-16-be")]
)  # fmt: skip
def test_a_mark_of_the_encoding_is_no_part_of_the_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secrets"
    path.write_bytes(content)
    path.chmod(0o600)
    text, warning = secrets_file.read(path)
    assert (secrets_file.parse(path, text), warning) == (({"A": "é"}, ()), "")


def test_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_bytes(b"A=1\nB=\xe9\n")
    path.chmod(0o600)
    with pytest.raises(SiteError, match="line 2 is not text in UTF-8"):
        secrets_file.read(path)


@pytest.mark.site(
    case="others can read the file of secrets",
    before="it was used",
    after="refused before the job is queued, with the mode",
)
@pytest.mark.parametrize("mode", [0o640, 0o644, 0o604, 0o610, 0o601])
def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secrets"
    path.write_text("A=1\n")
    path.chmod(mode)
    assert secrets_file.read(path) == ("A=1\n", f"others may read or write it (mode {mode:o}). Type chmod 600 {path}")
    path.chmod(0o600)  # the remedy
    assert secrets_file.read(path) == ("A=1\n", "")


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secrets"
    path.write_text("A=1\n")
    path.chmod(mode)
    with pytest.raises(SiteError, match=f"mode {mode:o}"):
        secrets_file.read(path)


def test_a_file_that_is_too_large_is_refused_and_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text("A=1\n" + "#" * secrets_file.MAX_BYTES)
    path.chmod(0o600)
    with pytest.raises(SiteError, match="is larger than 1 MiB"):
        secrets_file.read(path)


def test_something_else_than_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)  # reading it would wait for ever
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(SiteError, match="is not a file|cannot be read"):
            secrets_file.read(path)
    assert secrets_file.read(tmp_path / "none") == ("", "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text("A=1\n")
    path.chmod(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(SiteError, match="belongs to another user"):
        secrets_file.read(path)
