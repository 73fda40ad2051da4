"""Recognizes, in the last lines of a log, what ended a job before its ranks could say why. Pure.

The logs are those of srun, of the batch script, and of ranks whose Python did not come as far as Muster's own code.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
from typing import NamedTuple

from launcher.run_folder.status import BAD_NODE, OUT_OF_MEMORY, USER_ERROR
from launcher.supervise.error_classes import HOST_MEMORY, classify_line

LONGEST_REASON = 400


class StartFailure(NamedTuple):
    """One kind of line, and what to do about it."""

    status: str
    """The status of attempt-N.json. A USER_ERROR is not started again."""
    pattern: str
    """A regular expression for the line, in any case."""
    remedy: str


NO_MODULES = (
    "batch shells of this cluster do not know `module`: set cluster.modules=[], and begin cluster.setup with the line that "
    "defines it, then `module load NAME || exit 2`; the line is often `source /etc/profile.d/modules.sh`"
)
PYTHON = "set cluster.python to a Python that exists on every node, or put its folder on a disk that the nodes share"
SCRIPT = "correct cluster.setup or cluster.modules: these are the shell lines that run before the ranks"
SRUN = "correct cluster.srun_args, or the options of sbatch in the job's section of cluster"
CONTAINER = "correct cluster.container: try the image by hand on a compute node"
RUN_FOLDER = "every node must be able to write the run folder: is it on a disk that the nodes share?"
OTHER_SYSTEM = (
    "cluster.python was built for another system than that of the node: use one that was installed on such a node"
)
NODE = "if this happens again, exclude the node (cluster.train.exclude=NODE) and tell the administrators of the cluster"

PROGRAM = r"(?:srun|slurmstepd|slurmd)(?:-\S+)?: (?:fatal|error): "
"""How Slurm's programs begin a line about an error."""
TRANSIENT = re.compile(
    rf"{PROGRAM}.*(?:timed out|connection|credential|unable to contact|zero bytes|busy|already complet|temporarily|try again|"
    r"slurm backup|communication|message (?:send|receive)|no route to host|aborted|force terminated|kill task)",
    re.IGNORECASE,
)
"""Such an error may not come again, so it is nothing that the user has to mend."""

START_FAILURES = (
    StartFailure(
        USER_ERROR,
        r"no space left on device|disk quota exceeded",
        "the disk or your quota is full: free space, then resume",
    ),
    StartFailure(OUT_OF_MEMORY, r"oom[-_ ]?kill|\bout of memory\b|cannot allocate memory", HOST_MEMORY),
    StartFailure(BAD_NODE, r"prolog\b.*(?:fail|error|hung)|failed prolog|unable to boot|node boot", NODE),
    StartFailure(USER_ERROR, r"\bmodule: (?:command )?not found", NO_MODULES),
    StartFailure(
        USER_ERROR,
        r"module\(s\) (?:are unknown|exist but)|unable to locate a modulefile|lmod has detected",
        "correct cluster.modules: `module avail` lists the names on a compute node",
    ),
    StartFailure(USER_ERROR, r"pyxis: .*(?:fail|error|couldn't|invalid|unable)|\benroot\b.*(?:fail|error)", CONTAINER),
    StartFailure(USER_ERROR, r"unrecognized option '--container", "this cluster's srun has no pyxis: " + CONTAINER),
    StartFailure(USER_ERROR, r"^fatal: +\S|\b(?:apptainer|singularity): (?:command )?not found", CONTAINER),
    StartFailure(USER_ERROR, r"execve\(\): \S*(?:apptainer|singularity)\S*: ", CONTAINER),
    StartFailure(
        USER_ERROR,
        r"error while loading shared libraries|version `glibc\S*' not found|exec format error|cannot execute binary file",
        OTHER_SYSTEM,
    ),
    StartFailure(USER_ERROR, r"(?:execve\(\): |\bexec: |line \d+: )\S*python[\d.]*: ", PYTHON),
    StartFailure(USER_ERROR, r"execve\(\): \S+: (?:no such file|permission denied)", SRUN),
    StartFailure(USER_ERROR, r"slurm_script: (?:line \d+: |.*syntax error)", SCRIPT),
    StartFailure(
        USER_ERROR,
        r"(?:srun|slurmstepd): error: (?:could not|unable to|couldn't) open .*(?:no such file|permission denied)",
        RUN_FOLDER,
    ),
    StartFailure(USER_ERROR, r"^muster: /.*: cannot be written: ", RUN_FOLDER),
    StartFailure(USER_ERROR, r"srun: (?:fatal: |unrecognized option|invalid option|option .* requires)", SRUN),
    StartFailure(
        USER_ERROR,
        rf"{PROGRAM}.*(?:invalid|more processors requested|not available|memory required|specification|not permitted|"
        r"permission denied|unrecognized|exclusive|limit|plugin|spank|cannot find|not found|mismatch|conflict)",
        SRUN,
    ),
)
"""In order of precedence: the first kind that fits a line wins."""

NOT_A_CAUSE = re.compile(
    r": tasks? [\d,-]+: |\*\*\* (?:step|job)|job step aborted|couldn't chdir|^muster: module load failed|"
    r"slurm_script: line \d+: +\d+ \w+",
    re.IGNORECASE,
)
"""Lines that tell how srun or the shell ended ranks and programs, and warnings."""
OWN_MESSAGE = re.compile(r"^muster: ([\w.]+(?:=\S+)?: .+)")
"""A message to the user, which names a key: nothing has to be added to it."""


def find(text: str) -> dict[str, str] | None:
    """Return status, reason and remedy for the last line of a log that names a failure; None if there is none.

    The last one, because a script goes on after most errors of its lines: what ended it comes last.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not NOT_A_CAUSE.search(line)]
    for line in reversed(lines):
        if found := _classify(line):
            return found
    return None


def last_error(text: str) -> str:
    """Return the last line with an error of srun or slurmstepd, whatever it says; empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if not NOT_A_CAUSE.search(line)]
    return next((_reason(line) for line in reversed(lines) if re.search(PROGRAM, line)), "")


def _classify(line: str) -> dict[str, str] | None:
    if own := OWN_MESSAGE.match(line):
        return {"status": USER_ERROR, "reason": own[1][:LONGEST_REASON], "remedy": ""}
    if TRANSIENT.search(line):
        return None
    for item in START_FAILURES:
        if re.search(item.pattern, line, re.IGNORECASE):
            return {"status": item.status, "reason": _reason(line), "remedy": item.remedy}
    if exception := classify_line(line):
        status, remedy = exception
        return {"status": status, "reason": _reason(line), "remedy": remedy}
    return None


def _reason(line: str) -> str:
    """Return a line without the path that Slurm gives to its copy of the batch script."""
    return re.sub(r"^\S*/slurm_script: ", "batch script, ", line)[:LONGEST_REASON]
