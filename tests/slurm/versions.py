"""The tests of chain, requeue and crash under several Slurms: `python -m tests.slurm.versions` or `make slurm-versions`.

The first Slurm is this machine's own. The others are those of newer Debian releases, which debootstrap unpacks below
build/slurm-versions. A command runs there with chroot, in mount and process namespaces of its own, with this machine's
Python, /tmp and devices, so nothing is left behind. The tests' cluster is started there as it is here.

`python -m tests.slurm.versions trixie -- COMMAND WORD...` runs another command in one release, from the root of the project.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

if __package__ in (None, ""):
    sys.exit("run it as a module: python -m tests.slurm.versions")

from tests.slurm import cluster, machine

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / "build/slurm-versions"
NATIVE = "native"
RELEASES = ("trixie", "sid")
"""Debian's releases with a Slurm that is newer than bookworm's 22.05: 24.11, and the newest that is packaged."""
PACKAGES = (
    "slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "procps", "hostname", "util-linux", "ca-certificates", "openssl",
    "libssl3t64", "libffi8", "libsqlite3-0", "libbz2-1.0", "liblzma5", "libexpat1", "zlib1g", "libreadline8t64", "libncursesw6",
    "make", "libgomp1",
)  # fmt: skip
"""What the tests' cluster needs, and the libraries of this machine's Python and torch."""
TESTS = (
    "tests/slurm/test_chain.py::test_chain_equals_the_reference[zero3]",
    "tests/slurm/test_chain.py::test_a_killed_rank_fails_the_job",
    "tests/slurm/test_requeue.py::test_a_preempted_training_restarts_when_nodes_are_free_again",
    "tests/slurm/test_requeue.py::test_a_training_at_its_time_limit_restarts",
    "tests/slurm/test_requeue.py::test_a_killed_rank_restarts_training_from_its_checkpoint",
    "tests/slurm/test_requeue.py::test_an_attempt_that_slurm_ends_without_a_signal_has_a_verdict",
)
"""The whole chain, a crash, preemption, a time limit, a requeue after a crash, and a requeue from outside."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")

ENTER = """
tree=$1; path=$2; shift 2
mount --bind "$tree" "$tree" # ip makes the root a slave mount, so it must be a mount
mount -t proc proc "$tree/proc"
mount --rbind /sys "$tree/sys"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/run"
while [ "$1" != -- ]; do mkdir -p "$tree$1"; mount --bind "$1" "$tree$1"; shift; done
shift
printf '127.0.0.1 localhost\\n::1 localhost\\n127.0.1.1 %s\\n' "$(hostname)" > "$tree/etc/hosts"
mkdir -p "$tree/usr/local/bin"; ln -sfn "$path" "$tree/usr/local/bin/python3"
chroot "$tree" /usr/bin/env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  OMP_NUM_THREADS=1 TERM=dumb LANG=C.UTF-8 PYTHONPATH="$PWD" bash -c 'cd "$0" && exec "$@"' "$PWD" "$@"
exit $?
"""
"""Run by bash in the new namespaces: TREE PYTHON FOLDER... -- COMMAND WORD..., which gets the same FOLDERs as here."""


class CannotRun(Exception):
    """Why a release cannot run on this machine, in one sentence."""


def unpacked(release: str) -> Path:
    """The folder of a release, which is unpacked if that has not been done. Raises CannotRun."""
    tree = TREES / release
    if tree.exists():
        return tree
    if not shutil.which("debootstrap"):
        raise CannotRun("debootstrap is missing: apt-get install debootstrap")
    partial = tree.with_name(f"{release}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    words = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", release, str(partial), _mirror()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        raise CannotRun(f"debootstrap cannot unpack {release}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    partial.rename(tree)
    return tree


def _mirror() -> str:
    """The mirror from which this machine's apt takes Debian's packages. Raises CannotRun."""
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    if not shutil.which(words[0]):
        raise CannotRun("this machine has no apt-get")
    mirrors = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    if not mirrors:
        raise CannotRun("apt-get of this machine has no mirror of Debian")
    return mirrors[0]


def inside(release: str, command: Sequence[str]) -> list[str]:
    """`command`, wrapped so that it runs in the tree of a release. Its processes end with it. Raises CannotRun."""
    if os.geteuid() != 0:
        raise CannotRun("chroot and mount need root: run this as root")
    if machine.roots():
        raise CannotRun("a cluster is up on this machine, and there is room for one: make slurm-down")
    tree = unpacked(release)
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    folders = ["/tmp", *map(str, _python_folders()), str(ROOT)]
    python = str(Path(sys.executable).resolve())
    return [*namespaces, "bash", "-euc", ENTER, "enter", str(tree), python, *folders, "--", *command]


def _python_folders() -> list[Path]:
    """The folders of this Python and of its packages. Of a Python in /usr only its own, since the tree has its own /usr."""
    base = Path(sys.base_prefix).resolve()
    own = (
        [Path(f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}")] if base == Path("/usr") else [base]
    )
    return [*own, Path(sys.prefix).resolve()]


def slurm_version(release: str) -> str:
    """The version of a release's Slurm. Raises CannotRun."""
    command = ["slurmctld", "-V"]
    if release != NATIVE:
        command = inside(release, command)
    elif reason := cluster.available():
        raise CannotRun(reason)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    match = re.search(r"\d+\.\d+\.\d+", done.stdout)
    if done.returncode or not match:
        raise CannotRun(f"{' '.join(command[-2:])} in {release}: {(done.stdout + done.stderr).strip()}")
    return match.group()


def run(release: str, command: Sequence[str]) -> int:
    """Run a command under the Slurm of a release, from the root of the project. Returns its exit status. Raises CannotRun."""
    words = list(command) if release == NATIVE else inside(release, command)
    try:
        return subprocess.run(words, cwd=ROOT, check=False).returncode
    finally:
        if release != NATIVE:  # the bridge outlives the namespaces of a command that was killed
            cluster.down()


def counts(report: Path) -> tuple[int, int]:
    """How many tests have passed and failed, by pytest's report in JUnit's form. A skipped test has not passed."""
    if not report.exists():
        return 0, len(TESTS)
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    total, *others = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    return total - sum(others), sum(others)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.versions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    everything = (NATIVE, *RELEASES)
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(everything)} (all)")
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    releases = parser.parse_args(own).releases or everything
    if unknown := [release for release in releases if release not in everything]:
        parser.error(f"{unknown[0]} is none of {', '.join(everything)}")
    if command:
        return max(run(release, command) for release in releases)
    return _run_tests(releases)


def _run_tests(releases: Sequence[str]) -> int:
    versions, skipped, passed, failed = [], [], 0, 0
    TREES.mkdir(parents=True, exist_ok=True)
    for release in releases:
        report, began = TREES / f"{release}.xml", time.monotonic()
        report.unlink(missing_ok=True)
        try:
            version = slurm_version(release)
            print(f"==== {release}: Slurm {version}", flush=True)
            run(release, [*PYTEST, f"--junitxml={report}", *TESTS])
        except CannotRun as reason:
            print(f"==== {release}: skipped: {reason}", flush=True)
            skipped.append(release)
            continue
        now_passed, now_failed = counts(report)
        print(f"{release}: {now_passed} passed, {now_failed} failed, {time.monotonic() - began:.0f} s", flush=True)
        versions, passed, failed = [*versions, version], passed + now_passed, failed + now_failed
    more = f" skipped={','.join(skipped)}" if skipped else ""
    print(f"RESULT versions={','.join(versions) or '-'} passed={passed} failed={failed}{more}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
