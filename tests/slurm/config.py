"""The configuration files of the test cluster, as text. Only pure functions: cluster.py writes the files."""

from collections.abc import Mapping
from pathlib import Path

CONTROLLER = "ctl"
GPUS_PER_NODE = 4
SLURMDBD_PORT = 6819

SLURM_CONF = """\
# The one-machine test cluster of Muster. Written by tests/slurm/cluster.py: edit tests/slurm/config.py instead.
ClusterName=muster
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid

# cred_expire: a requeued job waits until its old credential expires, by default two minutes.
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=5

# Works without cgroups and systemd: processes are tracked by their parent, and tasks are not bound to CPUs.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/{gather}
AccountingStorageType=accounting_storage/{storage}
{accounting_lines}
# Schedule every second, so that a requeued job starts after 6 s instead of up to 20 s (with the defaults, up to minutes).
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
# Without DefMemPerCPU, one job gets the whole memory of a node.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000

# Requeue, preemption and node failures as on a real cluster, with shorter waits.
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmdTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# config_overrides: report the hardware below, whatever the machine really has.
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE
PartitionName=gpu Default=YES PriorityTier=1 GraceTime=15
PartitionName=cpu PriorityTier=1 PreemptMode=OFF
PartitionName=high PriorityTier=10
"""

NODE = (
    "NodeName={name} NodeAddr={address} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 "
    "RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN"
)

ACCOUNTING = """\
AccountingStorageHost={address}
AccountingStoragePort={port}
AccountingStoragePass={root}/run/munge.socket
AccountingStorageTRES=gres/gpu
"""

# slurmdbd reaches the database through MYSQL_UNIX_PORT in its environment, because StorageHost takes no socket path.
SLURMDBD_CONF = """\
DbdHost={controller}
DbdAddr={address}
DbdPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
SlurmUser=root
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


def files(*, root: Path, addresses: Mapping[str, str], accounting: bool) -> dict[str, str]:
    """File name -> text, for the folder `root`. `addresses` maps every node, and CONTROLLER, to its IPv4 address."""
    controller_address = addresses[CONTROLLER]
    nodes = {name: address for name, address in addresses.items() if name != CONTROLLER}
    database = {"root": root, "address": controller_address, "port": SLURMDBD_PORT}
    texts = {
        "slurm.conf": SLURM_CONF.format(
            root=root,
            controller=CONTROLLER,
            controller_address=controller_address,
            gather="linux" if accounting else "none",
            storage="slurmdbd" if accounting else "none",
            accounting_lines=ACCOUNTING.format(**database) if accounting else "",
            nodes="\n".join(NODE.format(name=name, address=nodes[name], gpus=GPUS_PER_NODE) for name in nodes),
        ),
        "gres.conf": f"NodeName={','.join(nodes)} Name=gpu File=/dev/nvidia[0-{GPUS_PER_NODE - 1}]\n",
        # Slurm 22.05 loads a cgroup plugin even if it does not use it. Only v1 works without systemd.
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
    }
    if accounting:
        texts["slurmdbd.conf"] = SLURMDBD_CONF.format(controller=CONTROLLER, **database)
    return texts
