"""launcher/environment.py: the environment contract, row by row, for every layout."""

import os
from collections.abc import Mapping

import pytest

from conf import resolve
from conf.choices import ProgramLauncher
from conf.schema import Config
from launcher import environment
from launcher.environment import RankInfo
from launcher.plan import plan
from launcher.submit import preview
from tests.conftest import RUN_DIR, Compose, put

LLAMA = ("cluster=slurm", "model=llama8b", "pipeline=checked")
ACCELERATE_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
"""Prefixes of the variables that Accelerate reads."""


def variables(config: Config, job: str = "train") -> dict[str, str]:
    planned = next(item for item in plan(config) if item.name == job)
    return environment.job_variables(config, planned)


FSDP = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
HSDP = FSDP | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
    "PARALLELISM_CONFIG_CP_SIZE": "1",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4",
}
ZERO3 = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"{RUN_DIR}/deepspeed.json",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
}
ZERO2 = ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
DDP = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["parallel=fsdp"], FSDP),
        (["parallel=hsdp"], HSDP),
        (["parallel=ddp"], DDP),
        (["parallel=zero2"], ZERO2),
        (["parallel=zero3"], ZERO3),
        (
            ["parallel=zero3", "parallel.context_ranks=2"],
            ZERO3
            | {
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(2 * int(ZERO3["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"])),
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_SP_SIZE": "2",
                "PARALLELISM_CONFIG_SP_BACKEND": "deepspeed",
            },
        ),
        (["parallel=fsdp_offload"], FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}),
        (["parallel=fsdp", "parallel.reshard_after_forward=false"], FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
        (["train.activation_checkpointing=full"], FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        (["model=qwen72b"], FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer"}),
        (["model=mistral7b"], FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "MistralDecoderLayer"}),
        (["train.precision=fp32"], FSDP | {"ACCELERATE_MIXED_PRECISION": "no"}),
        (["train.global_batch=256"], FSDP | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}),
        (["train.micro_batch=2"], FSDP | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_accelerate_gets_this_backends_variables_only(
    compose: Compose, words: list[str], expected: dict[str, str]
) -> None:
    values = variables(compose(*LLAMA, *words))
    assert {key: value for key, value in values.items() if key.startswith(ACCELERATE_PREFIXES)} == expected


def test_a_model_of_unknown_type_sets_no_block_class(compose: Compose) -> None:
    values = variables(compose("cluster=slurm", "model=hub", "model.source=owner/name"))
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in values
    assert values["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.parametrize(("timeout_s", "minutes"), [(1800, "30"), (90, "2"), (60, "1"), (61, "2"), (1, "1")])
def test_one_timeout_sets_all_others_in_their_units(compose: Compose, timeout_s: int, minutes: str) -> None:
    values = variables(put(compose(*LLAMA), {"cluster.network.nccl_timeout_s": timeout_s}))
    assert values["MUSTER_NCCL_TIMEOUT"] == values["AXOLOTL_NCCL_TIMEOUT"] == str(timeout_s)
    assert values["DEEPSPEED_TIMEOUT"] == minutes


def test_the_timeout_is_half_an_hour_by_default(compose: Compose) -> None:
    assert variables(compose(*LLAMA))["MUSTER_NCCL_TIMEOUT"] == "1800"


def test_nccls_flight_recorder_writes_into_the_run(compose: Compose) -> None:
    values = variables(compose(*LLAMA), "preflight")
    assert values["TORCH_FR_DUMP_TEMP_FILE"] == f"{RUN_DIR}/jobs/preflight/flight_rank_"
    assert values["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(values["TORCH_FR_BUFFER_SIZE"]) > 0


@pytest.mark.parametrize("name", ["TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_old_names_that_torch_warns_about_are_not_set(compose: Compose, name: str) -> None:
    assert name not in variables(compose(*LLAMA))


@pytest.mark.parametrize("job", ["preflight", "preprocess", "train", "consolidate", "evaluate", "generate"])
def test_every_job_gets_its_run_and_its_cpus(compose: Compose, job: str) -> None:
    config = compose(*LLAMA)
    values = variables(config, job)
    cpus = {"preflight": "12", "train": "12", "evaluate": "12", "generate": "12"}.get(job, "16")
    assert values["MUSTER_RUN"] == RUN_DIR
    assert values["MUSTER_JOB"] == job
    assert values["MUSTER_CONFIG"] == resolve.digest(config)
    assert values["OMP_NUM_THREADS"] == values["SRUN_CPUS_PER_TASK"] == cpus
    assert values["SLURM_EXPORT_ENV"] == "ALL"


@pytest.mark.parametrize("job", ["preprocess", "consolidate", "evaluate", "generate"])
def test_a_job_without_a_process_group_has_no_variables_for_one(compose: Compose, job: str) -> None:
    names = ("MASTER_", "NCCL_", "TORCH_", "MUSTER_NCCL", "DEEPSPEED_", *ACCELERATE_PREFIXES)
    assert not [key for key in variables(compose(*LLAMA), job) if key.startswith(names)]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_per_rank_variables_are_not_in_the_batch_script(compose: Compose, name: str) -> None:
    assert name not in variables(compose(*LLAMA))


@pytest.mark.parametrize(("job", "expected"), [("train", True), ("generate", True), ("consolidate", False)])
def test_only_jobs_with_gpus_set_their_allocator(compose: Compose, job: str, expected: bool) -> None:
    assert ("PYTORCH_ALLOC_CONF" in variables(compose(*LLAMA), job)) is expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"cluster.hf_home": "/shared/hf"}, {"HF_HOME": "/shared/hf"}),
        ({"cluster.offline": True}, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}),
    ],
    ids=["default", "hf_home", "offline"],
)
def test_the_hubs_variables_are_set_only_on_request(
    compose: Compose, values: dict[str, object], expected: dict[str, str]
) -> None:
    job_values = variables(put(compose(*LLAMA), values), "preprocess")
    assert {key: value for key, value in job_values.items() if key.startswith("HF_")} == expected


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "OMP_NUM_THREADS", "DEEPSPEED_TIMEOUT", "FSDP_VERSION", "MINE"])
@pytest.mark.parametrize("job", ["train", "consolidate"])
def test_a_variable_of_the_user_wins(compose: Compose, name: str, job: str) -> None:
    assert variables(put(compose(*LLAMA), {"cluster.environment": {name: "7"}}), job)[name] == "7"


SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "7", "SLURM_NODEID": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, RankInfo(0, 0, 1, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, RankInfo(0, 0, 1, 1, 0)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, RankInfo(5, 1, 7, 2, 2)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2(x2)"}, RankInfo(5, 1, 7, 2, 2)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),3"}, RankInfo(5, 1, 7, 3, 2)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x16)"}, RankInfo(5, 1, 7, 8, 2)),
        (SLURM | {"SLURM_TASKS_PER_NODE": "4(x8)"}, RankInfo(5, 1, 7, 4, 2)),
        (SLURM | {"SLURM_TASKS_PER_NODE": "9(x8)", "SLURM_STEP_TASKS_PER_NODE": "1,2,4"}, RankInfo(5, 1, 7, 4, 2)),
        (
            {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"},
            RankInfo(1, 1, 2, 2, 0),
        ),
        (
            SLURM | {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NTASKS": "2"},
            RankInfo(0, 0, 2, 2, 0),
        ),
        (SLURM | {"SUBMITIT_EXECUTOR": "slurm", "SLURM_STEP_TASKS_PER_NODE": "7(x3)"}, RankInfo(5, 1, 7, 7, 2)),
    ],
    ids=[
        "alone",
        "alone, with variables of another launcher",
        "fewer on the last node",
        "more on the first node",
        "more on the last node",
        "the same on each",
        "of the job",
        "of the step before the job",
        "local",
        "local inside a Slurm job",
        "submitit on Slurm",
    ],
)
def test_ranks_come_from_submitit_or_slurm(environ: Mapping[str, str], expected: RankInfo) -> None:
    assert environment.read_rank_info(environ) == expected


def test_rank_info_as_torchs_variables() -> None:
    assert RankInfo(rank=5, local_rank=1, world_size=7, local_world_size=2, node_rank=2).variables() == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "2",
        "NODE_WORLD_SIZE": "2",
    }


BOTH = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}


@pytest.mark.parametrize(
    ("interface", "routing_interface", "environ", "expected", "reason"),
    [
        ("auto", "ib0", {}, BOTH | {"NCCL_SOCKET_IFNAME": "=ib0"}, "ib0: routes to MASTER_ADDR"),
        ("auto", "lo", {}, {"GLOO_SOCKET_IFNAME": "lo"}, "NCCL's stays unset"),
        ("auto", None, {}, {}, "no interface routes to MASTER_ADDR"),
        ("ib0", "eth0", {}, BOTH, "ib0: cluster.network.interface"),
        ("ib0", None, {}, BOTH, "ib0: cluster.network.interface"),
        ("auto", "ib0", {"NCCL_SOCKET_IFNAME": "eth1"}, {"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ("auto", "ib0", {"GLOO_SOCKET_IFNAME": "eth1"}, {"NCCL_SOCKET_IFNAME": "=ib0"}, "ib0"),
        ("ib0", "ib0", {"NCCL_SOCKET_IFNAME": "=eth1", "GLOO_SOCKET_IFNAME": "eth1"}, {}, "ib0"),
    ],
    ids=["auto", "this host", "no route", "named", "named without route", "NCCL's set", "Gloo's set", "both set"],
)
def test_an_interface_is_set_only_if_it_is_certain(
    compose: Compose,
    interface: str,
    routing_interface: str | None,
    environ: dict[str, str],
    expected: dict[str, str],
    reason: str,
) -> None:
    config = put(compose(*LLAMA), {"cluster.network.interface": interface})
    values, why = environment.network_variables(config, routing_interface, environ)
    assert values == expected
    assert reason in why


def test_compiler_caches_are_per_user_on_the_nodes_disk(compose: Compose) -> None:
    config = put(compose(*LLAMA), {"cluster.scratch": "/local"})
    mine, yours = (environment.cache_variables(config, user_id) for user_id in (1000, 1001))
    assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(mine)
    assert all(folder.startswith("/local/muster-1000/") for folder in mine.values())
    assert not set(mine.values()) & set(yours.values())


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("HF_TOKEN=hf_1\nOTHER=2\n", {}, {"HF_TOKEN": "hf_1"}),
        ("# a comment\n\n HF_TOKEN = hf_1 \n", {}, {"HF_TOKEN": "hf_1"}),
        ("HF_TOKEN=a=b==\n", {}, {"HF_TOKEN": "a=b=="}),
        ("HF_TOKEN=hf_1\nWANDB_API_KEY=w\n", {}, {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "w"}),
        ("HF_TOKEN=hf_1\nHF_TOKEN=hf_2\n", {}, {"HF_TOKEN": "hf_2"}),
        ("HF_TOKEN=hf_1", {"HF_TOKEN": "hf_0"}, {}),
        ("HF_TOKEN", {}, {}),
        ("", {}, {}),
    ],
    ids=["only those named", "spaces and comments", "an = in it", "two", "the last", "set already", "no value", "none"],
)
def test_missing_secrets_are_read_from_the_file(
    compose: Compose, text: str, environ: dict[str, str], expected: dict[str, str]
) -> None:
    config = put(compose(*LLAMA), {"cluster.secrets": ["HF_TOKEN", "WANDB_API_KEY"]})
    assert environment.secret_values(config, environ, text) == expected


def test_the_runs_code_comes_before_the_users(compose: Compose) -> None:
    config = compose(*LLAMA)
    assert environment.python_path(config, {"PYTHONPATH": "/mine:/ours"}) == f"{RUN_DIR}/code:/mine:/ours"
    assert (
        environment.python_path(config, {}) == environment.python_path(config, {"PYTHONPATH": ""}) == f"{RUN_DIR}/code"
    )


def test_variables_are_restored_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTER_TEST", "before")
    before = dict(os.environ)
    with (
        pytest.raises(ZeroDivisionError),
        environment.temporary_variables({"MUSTER_TEST": "in", "MUSTER_TEST_NEW": "in"}),
    ):
        assert (os.environ["MUSTER_TEST"], os.environ["MUSTER_TEST_NEW"]) == ("in", "in")
        raise ZeroDivisionError
    assert dict(os.environ) == before


@pytest.mark.site(
    case="`cpus-per-gpu`, an own `cpus-per-task`, ranks bound to few CPUs",
    before="srun failed, or too many threads",
    after="as granted",
)
@pytest.mark.parametrize(
    ("options", "environ", "cpus", "expected"),
    [
        ({}, {"SLURM_CPUS_ON_NODE": "96"}, 96, "12"),
        ({}, {"SLURM_CPUS_ON_NODE": "96"}, 4, "4"),
        ({}, {}, 1, "1"),
        ({"cpus-per-task": "6"}, {"SLURM_CPUS_ON_NODE": "96"}, 96, "6"),
        ({"cpus-per-gpu": "5"}, {"SLURM_CPUS_ON_NODE": "40"}, 40, "5"),
        ({"cpus-per-gpu": "5"}, {"SLURM_CPUS_ON_NODE": "40"}, 96, "5"),
        ({"cpus-per-gpu": "5"}, {"SLURM_CPUS_ON_NODE": "40"}, 5, "5"),
        ({"cpus-per-task": None}, {"SLURM_CPUS_ON_NODE": "4"}, 4, "1"),
    ],
    ids=[
        "asked",
        "bound to fewer",
        "one CPU",
        "own",
        "shared",
        "shared, not confined",
        "bound",
        "less than one for each",
    ],
)
def test_a_rank_has_as_many_threads_as_it_was_granted(
    compose: Compose, options: dict[str, str | None], environ: dict[str, str], cpus: int, expected: str
) -> None:
    config = put(compose(*LLAMA), {"cluster.train.sbatch": options})
    assert environment.thread_variables(config, "train", environ, cpus, 8) == {"OMP_NUM_THREADS": expected}
    own = put(config, {"cluster.environment": {"OMP_NUM_THREADS": "3"}})
    assert environment.thread_variables(own, "train", environ, cpus, 8) == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "12"), ({"c": "6"}, "6"), ({"cpus-per-gpu": "8"}, None), ({"cpus_per_task": None}, None)],
    ids=["asked", "own", "per GPU", "left out"],
)
def test_srun_asks_for_the_cpus_of_the_job(
    compose: Compose, options: dict[str, str | None], expected: str | None
) -> None:
    values = variables(put(compose(*LLAMA), {"cluster.train.sbatch": options}))
    assert (values.get("SRUN_CPUS_PER_TASK"), values.get("OMP_NUM_THREADS")) == (expected, expected)


@pytest.mark.parametrize(
    ("values", "form", "port"),
    [
        ({}, None, None),
        ({"cluster.network.master_suffix": "i"}, "{host}i", None),
        ({"cluster.network.master_address": "ib-{host}"}, "ib-{host}", None),
        ({"cluster.network.master_suffix": "i", "cluster.environment": {"MASTER_ADDR": "10.0.0.1"}}, "10.0.0.1", None),
        ({"cluster.network.master_port": 2000, "cluster.environment": {"MASTER_PORT": "3000"}}, None, 3000),
    ],
    ids=["default", "suffix", "address", "environment wins", "port"],
)
def test_the_plan_shows_where_ranks_meet(
    compose: Compose, values: dict[str, object], form: str | None, port: int | None
) -> None:
    config = put(compose(*LLAMA), values)
    assert (environment.master_form(config), environment.master_port(config)) == (form, port)
    text = preview.text(config, plan(config))
    assert f"MASTER_ADDR={form or '<first host of the allocation>'}  MASTER_PORT={port or '<a free port, '}" in text
    assert variables(config).get("MUSTER_MASTER_HOST") == form


def test_a_program_of_the_user_keeps_its_own_accumulation(compose: Compose) -> None:
    config = put(
        compose(*LLAMA, "pipeline=custom"),
        {"custom.command": "python a.py", "custom.launcher": ProgramLauncher.torchrun},
    )
    values = variables(config, "custom")
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in values
    assert (values["OMP_NUM_THREADS"], values["SRUN_CPUS_PER_TASK"]) == ("12", "96")
    assert values["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.parametrize(("launcher", "threads"), [("srun", "12"), ("torchrun", "12")])
def test_ranks_that_one_task_starts_share_its_threads(compose: Compose, launcher: str, threads: str) -> None:
    config = compose(*LLAMA, "pipeline=custom", f"custom.launcher={launcher}", 'custom.command="python a.py"')
    ranks = 8 if launcher == "srun" else 1
    granted = 96 // ranks
    found = environment.thread_variables(config, "custom", {"SLURM_CPUS_ON_NODE": "96"}, granted, ranks)
    assert found == {"OMP_NUM_THREADS": threads}
