"""launcher/status/pending_reasons.py: every reason that Slurm 20.11 to 26.05 can print has plain words and a remedy."""

import pytest

from conf import resolve
from launcher.status.pending_reasons import NEVER, Waiting, explained, minutes

REASONS = """
None Prolog Priority Dependency Resources PartitionNodeLimit PartitionTimeLimit PartitionDown PartitionInactive JobHeldAdmin
JobHeldUser BeginTime Licenses AssociationJobLimit AssociationResourceLimit AssociationTimeLimit Reservation ReqNodeNotAvail
FrontEndDown SchedDefer NodeDown BadConstraints SystemFailure JobLaunchFailure NonZeroExitCode RaisedSignal TimeLimit
InactiveLimit InvalidAccount InvalidQOS QOSUsageThreshold QOSJobLimit QOSResourceLimit QOSTimeLimit Cleaning QOSNotAllowed
AccountNotAllowed DependencyNeverSatisfied QOSGrpCpuLimit QOSGrpCPUMinutesLimit QOSGrpCPURunMinutesLimit QOSGrpJobsLimit
QOSGrpMemLimit QOSGrpNodeLimit QOSGrpSubmitJobsLimit QOSGrpWallLimit QOSMaxCpuPerJobLimit QOSMaxCpuMinutesPerJobLimit
QOSMaxNodePerJobLimit QOSMaxWallDurationPerJobLimit QOSMaxCpuPerUserLimit QOSMaxJobsPerUserLimit QOSMaxNodePerUserLimit
QOSMaxSubmitJobPerUserLimit QOSMinCpuNotSatisfied AssocGrpCpuLimit AssocGrpCPUMinutesLimit AssocGrpCPURunMinutesLimit
AssocGrpJobsLimit AssocGrpMemLimit AssocGrpNodeLimit AssocGrpSubmitJobsLimit AssocGrpWallLimit AssocMaxJobsLimit
AssocMaxCpuPerJobLimit AssocMaxCpuMinutesPerJobLimit AssocMaxNodePerJobLimit AssocMaxWallDurationPerJobLimit
AssocMaxSubmitJobLimit JobHoldMaxRequeue JobArrayTaskLimit BurstBufferResources BurstBufferStageIn BurstBufferOperation
AssocGrpUnknown AssocGrpUnknownMinutes AssocGrpUnknownRunMinutes AssocMaxUnknownPerJob AssocMaxUnknownPerNode
AssocMaxUnknownMinutesPerJob AssocMaxCpuPerNode AssocGrpMemMinutes AssocGrpMemRunMinutes AssocMaxMemPerJob AssocMaxMemPerNode
AssocMaxMemMinutesPerJob AssocGrpNodeMinutes AssocGrpNodeRunMinutes AssocMaxNodeMinutesPerJob AssocGrpEnergy
AssocGrpEnergyMinutes AssocGrpEnergyRunMinutes AssocMaxEnergyPerJob AssocMaxEnergyPerNode AssocMaxEnergyMinutesPerJob
AssocGrpGRES AssocGrpGRESMinutes AssocGrpGRESRunMinutes AssocMaxGRESPerJob AssocMaxGRESPerNode AssocMaxGRESMinutesPerJob
AssocGrpLicense AssocGrpLicenseMinutes AssocGrpLicenseRunMinutes AssocMaxLicensePerJob AssocMaxLicenseMinutesPerJob AssocGrpBB
AssocGrpBBMinutes AssocGrpBBRunMinutes AssocMaxBBPerJob AssocMaxBBPerNode AssocMaxBBMinutesPerJob QOSGrpUnknown
QOSGrpUnknownMinutes QOSGrpUnknownRunMinutes QOSMaxUnknownPerJob QOSMaxUnknownPerNode QOSMaxUnknownPerUser
QOSMaxUnknownMinutesPerJob QOSMinUnknown QOSMaxCpuPerNode QOSGrpMemoryMinutes QOSGrpMemoryRunMinutes QOSMaxMemoryPerJob
QOSMaxMemoryPerNode QOSMaxMemoryPerUser QOSMaxMemoryMinutesPerJob QOSMinMemory QOSGrpNodeMinutes QOSGrpNodeRunMinutes
QOSMaxNodeMinutesPerJob QOSMinNode QOSGrpEnergy QOSGrpEnergyMinutes QOSGrpEnergyRunMinutes QOSMaxEnergyPerJob
QOSMaxEnergyPerNode QOSMaxEnergyPerUser QOSMaxEnergyMinutesPerJob QOSMinEnergy QOSGrpGRES QOSGrpGRESMinutes
QOSGrpGRESRunMinutes QOSMaxGRESPerJob QOSMaxGRESPerNode QOSMaxGRESPerUser QOSMaxGRESMinutesPerJob QOSMinGRES QOSGrpLicense
QOSGrpLicenseMinutes QOSGrpLicenseRunMinutes QOSMaxLicensePerJob QOSMaxLicensePerUser QOSMaxLicenseMinutesPerJob QOSMinLicense
QOSGrpBB QOSGrpBBMinutes QOSGrpBBRunMinutes QOSMaxBBPerJob QOSMaxBBPerNode QOSMaxBBPerUser QOSMinBB DeadLine MaxBBPerAccount
MaxCpuPerAccount MaxEnergyPerAccount MaxGRESPerAccount MaxNodePerAccount MaxLicensePerAccount MaxMemoryPerAccount
MaxUnknownPerAccount MaxJobsPerAccount MaxSubmitJobsPerAccount PartitionConfig AccountingPolicy FedJobLock OutOfMemory
MaxMemPerLimit AssocGrpBilling AssocGrpBillingMinutes AssocGrpBillingRunMinutes AssocMaxBillingPerJob AssocMaxBillingPerNode
AssocMaxBillingMinutesPerJob QOSGrpBilling QOSGrpBillingMinutes QOSGrpBillingRunMinutes QOSMaxBillingPerJob
QOSMaxBillingPerNode QOSMaxBillingPerUser QOSMaxBillingMinutesPerJob MaxBillingPerAccount QOSMinBilling ReservationDeleted
ReservationInvalid Constraints MaxBBRunMinsPerAccount MaxBillingRunMinsPerAccount MaxCpuRunMinsPerAccount
MaxEnergyRunMinsPerAccount MaxGRESRunMinsPerAccount MaxNodeRunMinsPerAccount MaxLicenseRunMinsPerAccount
MaxMemoryRunMinsPerAccount MaxUnknownRunMinsPerAccount MaxBBRunMinsPerUser MaxBillingRunMinsPerUser MaxCpuRunMinsPerUser
MaxEnergyRunMinsPerUser MaxGRESRunMinsPerUser MaxNodeRunMinsPerUser MaxLicenseRunMinsPerUser MaxMemoryRunMinsPerUser
MaxUnknownRunMinsPerUser MaxPoweredUpNodes MpiPortsBusy
""".split()  # noqa: SIM905 (two hundred names)
"""What `job_reason_string` of Slurm's sources returns, from 20.11 to 26.05."""
FIELDS = {
    "Partition": "gpu",
    "TimeLimit": "04:00:00",
    "NumNodes": "9-9",
    "Dependency": "afterok:12(unfulfilled),afterok:99_3(unfulfilled),afterany:98_*(unfulfilled)",
}


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_of_slurm_has_plain_words(reason: str) -> None:
    text = explained(Waiting("7", reason, fields=FIELDS))
    assert text.endswith(f" [{reason}]")
    assert not text.startswith("waits [")
    assert "{" not in text
    for word in text.replace("(", " ").split():
        key = word.rstrip(".,;:)=").split("=")[0]
        if key.startswith("cluster."):
            assert key == "cluster.train" or key.removesuffix(key[key.index(".sbatch") :] if ".sbatch" in key else "") in [
                *resolve.keys(), "cluster.train",
            ]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (
            "PartitionTimeLimit",
            NEVER + "partition gpu allows 2 h, and the job asks for 4 h. Set cluster.train.time_min=120",
        ),
        ("JobHeldUser", "Type scontrol release 7"),
        ("Dependency", "waits for preprocess 12 and job 99_3 and job 98"),
        ("DependencyNeverSatisfied", NEVER + "preprocess 12 and job 99_3 and job 98 did not complete"),
        ("Priority", "come first; Slurm expects to start it at 2026-11-29T12:00:00"),
        ("Resources", "in use; Slurm expects to start it at 2026-11-29T12:00:00"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "(UnavailableNodes:n[1-2])"),
        ("ReqNodeNotAvail, Reserved for maintenance", "(Reserved for maintenance)"),
        ("BadConstraints", NEVER + "no nodes have what it asks for. Compare cluster.train"),
        ("QOSMaxGRESPerUser", "its QOS uses as much GPUs or other GRES as it may. It starts when another job ends"),
        ("QOSMaxWallDurationPerJobLimit", NEVER + "its QOS allows less time for one job. Lower cluster.train.time_min"),
        ("AssocGrpCPUMinutesLimit", NEVER + "your account has no CPUs times minutes left"),
        ("AssocGrpGRESRunMinutes", "or cluster.train.time_min"),
        ("QOSMinGRES", NEVER + "its QOS is for jobs with more GPUs or other GRES"),
        ("launch failed requeued held", "type scontrol release 7"),
        ("job requeued in held state", "Type scontrol release 7"),
        ("SomethingOfNextYear", "waits; Slurm expects"),
    ],
)
@pytest.mark.site(
    case="a job waits, and squeue prints `PartitionTimeLimit`",
    before="shown as it is",
    after="the cause and what to type",
)
def test_what_a_user_reads(reason: str, expected: str) -> None:
    waiting = Waiting("7", reason, "cluster.train", "2026-11-29T12:00:00", FIELDS, "02:00:00", {"12": "preprocess"})
    assert expected in explained(waiting)


@pytest.mark.parametrize(
    ("text", "expected"), [("02:00:00", 120), ("1-00:30:00", 1470), ("UNLIMITED", None), ("", None)]
)
def test_times_of_slurm_are_read(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("reason", ["{x}", "%s", "(null)", "a,b,c", "", "[/red]"])
def test_any_other_text_is_shown_as_it_is(reason: str) -> None:
    assert explained(Waiting("7", reason)).endswith(f"[{reason}]")
