"""launcher/supervise/private_folder.py: others cannot get a folder of theirs, or a link, into the place of ours."""

import os
from pathlib import Path

import pytest

from conf.errors import SiteError
from launcher.supervise import private_folder

ME = os.getuid()
ROOT_ONLY = pytest.mark.skipif(ME != 0, reason="only root can give a folder to another user")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o1777)
    return tmp_path / "scratch"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_new_folder_is_private_whatever_the_umask(scratch: Path) -> None:
    before = os.umask(0)
    try:
        assert private_folder.make(str(scratch), ME) == scratch / f"muster-{ME}"
    finally:
        os.umask(before)
    assert mode(scratch / f"muster-{ME}") == 0o700
    assert private_folder.make(str(scratch), ME) == scratch / f"muster-{ME}"


def test_a_folder_of_an_earlier_version_is_closed(scratch: Path) -> None:
    (scratch / f"muster-{ME}/triton").mkdir(parents=True)
    (scratch / f"muster-{ME}").chmod(0o755)
    assert private_folder.make(str(scratch), ME) == scratch / f"muster-{ME}"
    assert mode(scratch / f"muster-{ME}") == 0o700


@pytest.mark.site(
    case="another user of the node has made the folder for caches in /tmp first",
    before="ranks compiled into it, and wrote over what its links named",
    after="a folder that only you own is made beside it",
)
@pytest.mark.parametrize(
    "kind", ["link", "link to nothing", "file", "open", "link inside", pytest.param("other owner", marks=ROOT_ONLY)]
)
def test_what_others_put_there_is_left_alone(scratch: Path, tmp_path: Path, kind: str) -> None:
    place, precious = scratch / f"muster-{ME}", tmp_path / "precious"
    precious.mkdir()
    if kind.startswith("link to") or kind == "link":
        place.symlink_to(precious if kind == "link" else tmp_path / "nothing")
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
    if kind == "open":
        place.chmod(0o777)
    if kind == "link inside":
        (place / "triton").symlink_to(precious)
    if kind == "other owner":
        os.chown(place, 65534, 65534)
    made = private_folder.make(str(scratch), ME)
    assert made == scratch / f"muster-{ME}-1"
    assert (mode(made), made.is_symlink()) == (0o700, False)
    assert list(precious.iterdir()) == []
    assert not (tmp_path / "nothing").exists()


def test_if_all_names_are_taken_the_remedy_helps(scratch: Path, tmp_path: Path) -> None:
    for name in (f"muster-{ME}", *(f"muster-{ME}-{number}" for number in range(1, private_folder.CANDIDATES))):
        (scratch / name).touch()
    with pytest.raises(SiteError, match="Set cluster.scratch to a folder of your own"):
        private_folder.make(str(scratch), ME)
    assert private_folder.make(str(tmp_path / "own"), ME) == tmp_path / f"own/muster-{ME}"


@pytest.mark.parametrize("bits", [0o777, 0o757])
def test_a_scratch_in_which_others_can_rename_is_refused(scratch: Path, bits: int) -> None:
    scratch.chmod(bits)
    with pytest.raises(SiteError, match=rf"cluster.scratch={scratch}: .* \(mode {bits:o}, without the sticky bit\)"):
        private_folder.make(str(scratch), ME)
    assert list(scratch.iterdir()) == []
    scratch.chmod(0o1777)  # the remedy
    private_folder.make(str(scratch), ME)


def test_a_folder_above_in_which_others_can_rename_is_refused(scratch: Path) -> None:
    (scratch / "mine").mkdir()
    scratch.chmod(0o777)
    with pytest.raises(SiteError, match=f"{scratch} lets others replace"):
        private_folder.make(str(scratch / "mine"), ME)


@ROOT_ONLY
def test_a_scratch_of_another_user_is_refused(scratch: Path) -> None:
    os.chown(scratch, 65534, 65534)
    with pytest.raises(SiteError, match="belongs to another user"):
        private_folder.make(str(scratch), ME)


@ROOT_ONLY
def test_a_scratch_of_a_group_is_refused_and_a_folder_in_it_is_taken(scratch: Path) -> None:
    os.chown(scratch, 0, 4242)
    scratch.chmod(0o2770)
    with pytest.raises(SiteError, match="without the sticky bit"):
        private_folder.make(str(scratch), ME)
    (scratch / "me").mkdir(mode=0o700)  # the remedy
    assert private_folder.make(str(scratch / "me"), ME) == scratch / f"me/muster-{ME}"


@pytest.mark.parametrize(
    ("bits", "expected"), [(0o700, True), (0o755, True), (0o777, False), (0o1777, False), (0o757, False)]
)
def test_a_cache_that_is_there_must_be_closed_to_others(tmp_path: Path, bits: int, expected: bool) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(bits)
    assert private_folder.is_private(folder, ME) is expected


def test_a_cache_that_is_not_there_yet_is_made_by_its_user(tmp_path: Path, scratch: Path) -> None:
    assert private_folder.is_private(tmp_path / "new/cache", ME)
    assert private_folder.is_private(scratch / "cache", ME)
    scratch.chmod(0o777)
    assert not private_folder.is_private(scratch / "cache", ME)
