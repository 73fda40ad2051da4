"""Says in plain words why Slurm does not start a job yet, whether it ever will, and what to type. Pure.

The reasons are those of Slurm 20.11 to 26.05, as squeue prints them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NEVER = "will never start: "


@dataclass(frozen=True)
class Waiting:
    """What Slurm says about a pending job, and what the launcher knows about it."""

    job_id: str
    reason: str
    section: str = "cluster.train"
    """The section of the cluster file with the job's resources."""
    start: str | None = None
    """When Slurm expects to start it; None if it does not know."""
    fields: Mapping[str, str] | None = None
    """Fields of `scontrol show job`: Partition, TimeLimit, Dependency and others."""
    limit: str | None = None
    """MaxTime of its partition, as Slurm writes it."""
    parents: Mapping[str, str] | None = None
    """Names of the run's jobs by their ids."""


EXACT = {
    "None": "Slurm has not looked at it yet{start}",
    "Priority": "jobs with a higher priority come first{start}",
    "Resources": "its nodes are in use{start}",
    "Dependency": "waits for {parents}",
    "DependencyNeverSatisfied": NEVER + "{parents} did not complete. See muster why RUN, then muster resume RUN",
    "PartitionTimeLimit": NEVER + "partition {partition} allows {limit}, and the job asks for {time}. "
    "Set {section}.time_min={minutes}, or use another partition",
    "PartitionNodeLimit": NEVER
    + "partition {partition} does not allow {nodes} nodes. Set {section}.nodes, or use another partition",
    "PartitionDown": "partition {partition} is switched off by the administrators; it waits until they open it. sinfo shows others",
    "PartitionInactive": "partition {partition} starts no jobs for now. sinfo shows others",
    "PartitionConfig": NEVER + "partition {partition} does not admit it: its account, its QOS or its size. "
    "scontrol show partition {partition} says whom it admits",
    "JobHeldUser": "is held, by you or by --hold. Type scontrol release {job}",
    "JobHeldAdmin": "is held by an administrator or by Slurm after a failed start. Ask them, or type scontrol release {job}",
    "JobHoldMaxRequeue": "is held: it was restarted more often than the site allows. Type scontrol release {job}",
    "BeginTime": "its begin time has not come{start}. After a restart Slurm waits up to two minutes",
    "Licenses": "waits for licenses ({section}.sbatch.licenses){start}",
    "Reservation": "its reservation has not begun{start}. scontrol show reservation says when",
    "ReservationDeleted": NEVER + "its reservation is gone. Change {section}.sbatch.reservation",
    "ReservationInvalid": NEVER + "it may not use its reservation. Change {section}.sbatch.reservation",
    "ReqNodeNotAvail": "nodes that it needs are reserved, for example for maintenance, or down{start}. "
    "A shorter {section}.time_min may end before that",
    "NodeDown": "a node that it needs is down. Change {section}.sbatch.nodelist",
    "BadConstraints": NEVER
    + "no nodes have what it asks for. Compare {section} (constraint, gpu_type, memory_gib, cpus_per_rank) "
    "with sinfo -o '%P %f %G %m %c'",
    "Constraints": NEVER
    + "no nodes have what it asks for. Compare {section} (constraint, gpu_type, memory_gib, cpus_per_rank) "
    "with sinfo -o '%P %f %G %m %c'",
    "InvalidAccount": NEVER
    + "its account does not exist any more. Set cluster.account; sacctmgr show associations user=$USER",
    "AccountNotAllowed": NEVER
    + "partition {partition} does not admit its account. Set cluster.account or {section}.partition",
    "InvalidQOS": NEVER + "its QOS does not exist any more. Set {section}.qos",
    "QOSNotAllowed": NEVER + "its account or partition may not use this QOS. Set {section}.qos",
    "QOSUsageThreshold": "the usage of its account is above what this QOS allows. Set another {section}.qos, or wait",
    "AccountingPolicy": "a limit of its account or QOS is reached. sacctmgr show associations user=$USER lists the limits",
    "MaxMemPerLimit": NEVER + "it asks for more memory than partition {partition} allows. Set {section}.memory_gib",
    "JobArrayTaskLimit": "other parts of its array come first",
    "Prolog": "its nodes are being prepared",
    "Cleaning": "its last attempt is being cleaned up. If that lasts, a node hangs: tell the administrators",
    "FrontEndDown": "the front end of the cluster is down. Tell the administrators",
    "SchedDefer": "Slurm has put it off{start}",
    "FedJobLock": "Slurm waits for another cluster of the federation",
    "DeadLine": NEVER + "its deadline is too early. Change {section}.sbatch.deadline",
    "BurstBufferResources": "waits for space in the burst buffer{start}",
    "BurstBufferStageIn": "its files are being copied into the burst buffer{start}",
    "BurstBufferOperation": "the burst buffer failed. Tell the administrators",
    "MaxPoweredUpNodes": "the site has as many nodes switched on as it allows{start}",
    "MpiPortsBusy": "ports that it needs are in use",
    "SystemFailure": "Slurm failed to start it. Tell the administrators",
    "JobLaunchFailure": "its last start failed on a node. scontrol show job {job} names it; exclude it with {section}.exclude",
    "NonZeroExitCode": "its last start failed. See muster why RUN",
    "RaisedSignal": "its last start was killed. See muster why RUN",
    "TimeLimit": "its last start reached the time limit. See muster why RUN",
    "InactiveLimit": "its last start did nothing for too long. See muster why RUN",
    "OutOfMemory": "its last start ran out of memory. Set {section}.memory_gib",
    "AssociationJobLimit": "your account has as many jobs as it may have. It starts when another ends",
    "AssociationResourceLimit": "your account uses as much as it may use. It starts when another job ends",
    "AssociationTimeLimit": NEVER + "it asks for more time than your account allows. Set {section}.time_min",
    "QOSJobLimit": "this QOS has as many jobs as it may have. It starts when another ends",
    "QOSResourceLimit": "this QOS uses as much as it may use. It starts when another job ends",
    "QOSTimeLimit": NEVER + "it asks for more time than its QOS allows. Set {section}.time_min or {section}.qos",
}
"""Reasons with words of their own."""

UNITS = {
    "cpu": ("CPUs", "{section}.cpus_per_rank or {section}.nodes"),
    "mem": ("memory", "{section}.memory_gib"),
    "memory": ("memory", "{section}.memory_gib"),
    "node": ("nodes", "{section}.nodes"),
    "gres": ("GPUs or other GRES", "{section}.gpus_per_node or {section}.nodes"),
    "lic": ("licenses", "{section}.sbatch.licenses"),
    "license": ("licenses", "{section}.sbatch.licenses"),
    "bb": ("burst buffer", "{section}.sbatch.bb"),
    "energy": ("energy", "{section}.time_min"),
    "billing": ("billed resources", "{section}.nodes"),
    "jobs": ("jobs", "fewer runs at once"),
    "job": ("jobs", "fewer runs at once"),
    "submitjob": ("submitted jobs", "fewer runs at once"),
    "submitjobs": ("submitted jobs", "fewer runs at once"),
    "wall": ("time", "{section}.time_min"),
    "wallduration": ("time", "{section}.time_min"),
    "unknown": ("a resource", "what the site's limits say"),
}
LIMIT = re.compile(
    r"(?P<who>Assoc|QOS)?(?P<kind>Grp|Max|Min)(?P<unit>Cpu|CPU|Mem|Memory|Node|GRES|Lic|License|BB|Energy|Billing|Jobs?|SubmitJobs?"
    r"|WallDuration|Wall|Unknown)(?P<run>Run)?(?P<min>Minutes|Mins)?(?P<per>Per(Job|Node|User|Account))?(Limit|NotSatisfied)?",
)
"""Limits of accounts and of QOS follow a pattern: QOSMaxCpuPerUserLimit, AssocGrpGRESRunMinutes, MaxNodePerAccount."""


def explained(waiting: Waiting) -> str:
    """Return why a job waits, in plain words: `waits`, `is held` or `will never start`, the cause, and what to type."""
    reason, _, rest = waiting.reason.strip("()").partition(",")  # ReqNodeNotAvail, UnavailableNodes:n1
    template = EXACT.get(reason.strip()) or _limit(reason.strip())
    if template is None:
        known = {"launch failed": EXACT["JobHeldAdmin"], "job requeued in held state": EXACT["JobHeldUser"]}
        template = next((text for part, text in known.items() if part in waiting.reason.lower()), "waits{start}")
    details = dict(_details(waiting))
    nodes = f" ({rest.strip()})" if rest.strip() else ""
    return f"{template.format(**details)}{nodes} [{waiting.reason}]"


def _limit(reason: str) -> str | None:
    """The words for a limit of an account or a QOS; None for another reason."""
    match = LIMIT.fullmatch(reason)
    if match is None:
        return None
    unit, remedy = UNITS[match["unit"].lower()]
    owner = {"QOS": "its QOS", "Assoc": "your account", None: "its QOS, for each account or user"}[match["who"]]
    what = f"{unit} times minutes" if match["min"] else unit
    remedy = f"{remedy} or {{section}}.time_min" if match["min"] else remedy
    if match["kind"] == "Min":
        return f"{NEVER}{owner} is for jobs with more {what}. Raise {remedy}, or set another {{section}}.qos"
    if match["kind"] == "Max" and match["per"] in ("PerJob", "PerNode") or match["unit"].startswith("WallD"):
        return f"{NEVER}{owner} allows less {what} for one job. Lower {remedy}, or set another {{section}}.qos"
    if match["min"] and not match["run"]:
        return f"{NEVER}{owner} has no {what} left. Ask for more, or set another cluster.account"
    return f"{owner} uses as much {what} as it may. It starts when another job ends, or with less: {remedy}"


def _details(waiting: Waiting) -> Iterator[tuple[str, str]]:
    fields = waiting.fields or {}
    limit_min = minutes(waiting.limit or "")
    yield "job", waiting.job_id
    yield "section", waiting.section
    yield "start", f"; Slurm expects to start it at {waiting.start}" if waiting.start else ""
    yield "partition", fields.get("Partition", "(its partition)")
    yield "nodes", fields.get("NumNodes", "so many").split("-")[0]
    yield "limit", _in_words(limit_min) if limit_min else "less time"
    yield "time", _in_words(minutes(fields.get("TimeLimit", "")) or 0) or "more"
    yield "minutes", str(limit_min) if limit_min else "..."
    yield "parents", _parents(fields.get("Dependency", ""), waiting.parents or {})


def _parents(dependency: str, names: Mapping[str, str]) -> str:
    """The jobs of a dependency such as `afterok:12(unfulfilled),singleton`, with the names that they have in the run."""
    parts = [
        f"{names[job]} {job}" if job in names else f"job {job}"
        for job in re.findall(r"(?<![\d_])\d+(?:_\d+)?", dependency)
    ]
    parts += ["another job of the same name"] if "singleton" in dependency else []
    return " and ".join(parts) or "another job"


def minutes(text: str) -> int | None:
    """The minutes of a time as Slurm prints it: [days-]hours:minutes:seconds. None for UNLIMITED and other texts."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins


def _in_words(total_min: int) -> str:
    hours, mins = divmod(total_min, 60)
    return " ".join([*([f"{hours} h"] if hours else []), *([f"{mins} min"] if mins else [])])
