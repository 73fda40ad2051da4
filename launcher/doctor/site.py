"""Asks Slurm for its version, partitions and accounts, and compares them with what a cluster's config names."""

from collections.abc import Iterator

from conf.schema_cluster import Cluster
from launcher import slurm
from launcher.doctor.check import Check, error, warning

TOPIC = "slurm"
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")


def checks(cluster: Cluster, user: str, *, needed: bool) -> Iterator[Check]:
    """Look at Slurm. `needed`: the cluster's jobs run on it."""
    if not slurm.installed():
        if needed:
            yield error(TOPIC, "commands", "squeue is not on PATH", "type this on a login node of the cluster")
        else:
            yield Check(TOPIC, "commands", "not on this machine; cluster=local works without")
        return
    try:
        yield Check(TOPIC, "version", slurm.call("scontrol", "--version").strip())
        yield from _partitions(cluster)
    except slurm.SlurmError as problem:
        judge = error if needed else warning
        yield judge(TOPIC, "controller", f"does not answer: {problem}", "try again later, or ask the administrators")
        return
    yield from _accounts(cluster, user)


def _partitions(cluster: Cluster) -> Iterator[Check]:
    lines = slurm.call("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G").splitlines()
    names = set()
    for line in lines:
        name, state, limit, nodes, gres = (line.strip().split("|") + [""] * 4)[:5]
        names.add(name.rstrip("*"))
        gpus = "" if gres in ("", "(null)") else f", {gres}"
        yield Check(TOPIC, f"partition {name}", f"{state}, {nodes} nodes, at most {limit}{gpus}")
    wanted = {"cluster.partition": cluster.partition}
    wanted |= {f"cluster.{name}.partition": getattr(cluster, name).partition for name in ("train", "cpu", "inference")}
    for key, value in wanted.items():
        for name in (value or "").split(","):
            if name and name not in names:
                remedy = f"set it to one of {', '.join(sorted(names))}"
                yield error(TOPIC, key, f"there is no partition {name}", remedy)


def _accounts(cluster: Cluster, user: str) -> Iterator[Check]:
    words = ("--noheader", "--parsable2", "show", "associations", f"user={user}", "format=Account,Partition,QOS")
    try:
        lines = slurm.call("sacctmgr", *words).splitlines()
    except slurm.SlurmError as problem:
        yield warning(TOPIC, "accounts", f"unknown: {problem}", "`muster efficiency` then lacks what accounting knows")
        return
    accounts = sorted({line.partition("|")[0] for line in lines if line.strip()})
    yield Check(TOPIC, "accounts", ", ".join(accounts) or "none are needed here")
    if cluster.account and accounts and cluster.account not in accounts:
        remedy = f"set it to one of {', '.join(accounts)}"
        yield error(TOPIC, "cluster.account", f"{cluster.account} is none of yours", remedy)
