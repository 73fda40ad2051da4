"""Reads the sbatch options of a cluster file (`cluster.train.sbatch` and so on): long names, flags, what is Muster's own. Pure."""

import re
from collections.abc import Mapping

from conf.schema_cluster import Resources

SHORT = {
    "A": "account", "B": "extra-node-info", "C": "constraint", "D": "chdir", "F": "nodefile", "G": "gpus", "H": "hold",
    "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes", "O": "overcommit", "Q": "quiet", "S": "core-spec",
    "V": "version", "W": "wait", "a": "array", "b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error", "h": "help",
    "i": "input", "k": "no-kill", "m": "distribution", "n": "ntasks", "o": "output", "p": "partition", "q": "qos",
    "s": "oversubscribe", "t": "time", "v": "verbose", "w": "nodelist", "x": "exclude",
}  # fmt: skip
"""sbatch's one-letter options."""
FLAGS = frozenset([
    "consolidate-segments", "contiguous", "help", "hold", "ignore-pbs", "no-requeue", "overcommit", "oversubscribe",
    "parsable", "quiet", "reboot", "requeue", "spread-job", "spread-segments", "stepmgr", "test-only", "usage",
    "use-min-nodes", "verbose", "version", "wait",
])  # fmt: skip
"""Options that take no value."""
FLAGS_WITH_VALUE = frozenset([
    "exclusive", "get-user-env", "nice", "no-kill", "oom-kill-step", "propagate", "x11",
])  # fmt: skip
"""Options whose value can be left out."""
WITH_VALUE = frozenset(
    [
        "account",
        "acctg-freq",
        "array",
        "batch",
        "bb",
        "bbf",
        "begin",
        "chdir",
        "cluster-constraint",
        "clusters",
        "comment",
        "constraint",
        "container",
        "container-id",
        "core-spec",
        "cores-per-socket",
        "cpu-freq",
        "cpus-per-gpu",
        "cpus-per-task",
        "deadline",
        "delay-boot",
        "dependency",
        "distribution",
        "error",
        "exclude",
        "export",
        "export-file",
        "extra",
        "extra-node-info",
        "gid",
        "gpu-bind",
        "gpu-freq",
        "gpus",
        "gpus-per-node",
        "gpus-per-socket",
        "gpus-per-task",
        "gres",
        "gres-flags",
        "hint",
        "input",
        "job-name",
        "kill-on-invalid-dep",
        "licenses",
        "mail-type",
        "mail-user",
        "mcs-label",
        "mem",
        "mem-bind",
        "mem-per-cpu",
        "mem-per-gpu",
        "mincpus",
        "network",
        "nodefile",
        "nodelist",
        "nodes",
        "ntasks",
        "ntasks-per-core",
        "ntasks-per-gpu",
        "ntasks-per-node",
        "ntasks-per-socket",
        "open-mode",
        "output",
        "partition",
        "power",
        "prefer",
        "priority",
        "profile",
        "qos",
        "reservation",
        "resources",
        "segment",
        "signal",
        "sockets-per-node",
        "switches",
        "thread-spec",
        "threads-per-core",
        "time",
        "time-min",
        "tmp",
        "tres-bind",
        "tres-per-task",
        "uid",
        "wckey",
        "wrap",
    ]
)
KNOWN = FLAGS | FLAGS_WITH_VALUE | WITH_VALUE
"""sbatch's options from Slurm 20.11 to 26.05. A site's plugins may add others."""
OTHER_NAMES = {"tasks-per-node": "ntasks-per-node", "share": "oversubscribe", "workdir": "chdir"}
"""Names that sbatch also takes, or took before Slurm 17.11, and today's name of the same option."""

OWN = {
    "array": "a job of a run is one job. For several runs add -m to the command",
    "chdir": "jobs start in the run folder. Set run_dir=...",
    "clusters": "the commands that follow a run ask one cluster. Remove it, and type export SLURM_CLUSTERS=NAME before launch.py "
    "and before muster",
    "cluster-constraint": "the commands that follow a run ask one cluster. Remove it, and type export SLURM_CLUSTERS=NAME",
    "error": "logs belong into the run folder. Set run_dir=...",
    "help": "a job would not be submitted. Remove it",
    "input": "jobs read no input. Remove it",
    "job-name": "jobs are named after the run. Set name=...",
    "nodes": "Set {section}.nodes=...",
    "no-requeue": "Set cluster.requeue=false",
    "ntasks": "Set {section}.nodes=... and {section}.ranks_per_node=...",
    "ntasks-per-gpu": "there is one rank for each GPU. Set {section}.ranks_per_node=...",
    "ntasks-per-node": "Set {section}.ranks_per_node=...",
    "output": "logs belong into the run folder. Set run_dir=...",
    "parsable": "the id of the job would not be found in sbatch's answer. Remove it",
    "quiet": "the id of the job would not be found in sbatch's answer. Remove it",
    "requeue": "Set cluster.requeue=true",
    "signal": "Set cluster.signal_s=...",
    "test-only": "a job would not be submitted. Use dry_run=true",
    "time": "Set {section}.time_min=...",
    "usage": "a job would not be submitted. Remove it",
    "version": "a job would not be submitted. Remove it",
    "wait": "launch.py would wait for the end of the first job. Remove it, and follow the run with muster status RUN",
    "wrap": "Muster writes the script. Put shell lines into cluster.setup",
}
"""Options that Muster sets itself, and what to do instead."""
CANNOT_BE_REMOVED = frozenset(
    ["chdir", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "output", "signal", "time"]
)

REPLACES = {
    "cpus-per-gpu": "cpus-per-task",
    "gpus": "gpus-per-node",
    "gpus-per-socket": "gpus-per-node",
    "gpus-per-task": "gpus-per-node",
    "mem-per-cpu": "mem",
    "mem-per-gpu": "mem",
    "oversubscribe": "exclusive",
}
"""Options that ask for the same in another way. sbatch refuses both together, so the user's replaces Muster's."""

GPU_REQUEST = re.compile(r"(?:gres[/:])?gpu(?:[:=](?P<type>[A-Za-z][^:=,]*))?(?:[:=](?P<count>\d+))?", re.IGNORECASE)


def long_name(key: str) -> str:
    """Return sbatch's name of an option: for `-N`, `NTASKS_PER_NODE` or `--gre`, what sbatch would take it for."""
    name = key.strip().removeprefix("--").removeprefix("-") if key.strip().startswith("-") else key.strip()
    if name in SHORT:
        return SHORT[name]
    name = name.lower().replace("_", "-")
    name = OTHER_NAMES.get(name, name)
    if name in KNOWN or not name:
        return name
    longer = [known for known in sorted(KNOWN) if known.startswith(name)]  # as getopt does
    return longer[0] if len(longer) == 1 else name


def value_of(name: str, text: str | None) -> str | bool | None:
    """Return the value of an option as submitit takes it: True for a flag, None for an option to leave out.

    OmegaConf turns YAML's true into the text `True`, because all other values of this dictionary are texts.
    """
    if text is None or (text in ("False", "false") and name not in WITH_VALUE):
        return None
    if name == "kill-on-invalid-dep" and text in ("True", "False"):  # YAML reads `yes` as true
        return "yes" if text == "True" else "no"
    return True if name not in WITH_VALUE and text in ("True", "true", "") else text


def given(resources: Resources) -> dict[str, str | bool | None]:
    """Return the user's sbatch options by their long names. None: leave out what Muster would set."""
    named = ((long_name(key), text) for key, text in resources.sbatch.items())
    return {name: value_of(name, text) for name, text in named}


def removed(options: Mapping[str, str | bool | None]) -> set[str]:
    """Return Muster's options that the user's leave out or replace."""
    names = {name for name, value in options.items() if value is None}
    names |= {REPLACES[name] for name, value in options.items() if name in REPLACES and value is not None}
    if any(gpus_in(options.get(name)) for name in ("gres", "tres-per-task")):
        names.add("gpus-per-node")
    return names


def gpus_in(value: str | bool | None) -> list[int]:
    """Return the counts of GPUs in a value such as `gpu:a100:4,shard:2` or `gres/gpu:1`."""
    items = value.split(",") if isinstance(value, str) else []
    found = (GPU_REQUEST.fullmatch(item.strip()) for item in items)
    return [int(match["count"] or 1) for match in found if match]


def cpus_per_rank(resources: Resources) -> int | None:
    """Return the CPUs that each rank asks for. None if only the node knows: with cpus-per-gpu, or without a request."""
    options = given(resources)
    own = options.get("cpus-per-task", "")
    if isinstance(own, str) and own.isdecimal():
        return int(own)
    return None if "cpus-per-task" in removed(options) else resources.cpus_per_rank


def dependency(own: list[str], user: str | bool | None) -> str | None:
    """Return the value of --dependency: the user's conditions and those on `own`, the ids of the jobs before this one."""
    parts = [
        part for part in (f"afterok:{':'.join(own)}" if own else "", user if isinstance(user, str) else "") if part
    ]
    return ",".join(parts) or None


def minutes(text: str) -> int | None:
    """The minutes of a time limit in Slurm's forms: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s. None for another text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        return None
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] or match[4]:
        return (days * 24 + first) * 60 + second + (third > 0)
    return first + (second > 0)
