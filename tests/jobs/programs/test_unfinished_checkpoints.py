"""conf/unfinished_checkpoints.py: a checkpoint of a program that a kill has cut short is noticed, and no other is suspected."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from conf import program_checkpoints
from conf.errors import RunError
from conf.unfinished_checkpoints import why_unfinished
from jobs.consolidation import of_program
from launcher.run_folder import attempts
from launcher.supervise import attempt
from muster import trainer_callback
from tests.conftest import Compose, put

WEIGHTS = {"a": torch.ones(64, 64), "b": torch.zeros(7)}


def torch_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(WEIGHTS, path)


def weights(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def sharded(folder: Path) -> None:
    for number in (1, 2):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(WEIGHTS, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


def of_trainer(folder: Path) -> None:
    weights(folder)
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin"):
        torch_file(folder / name)
    (folder / "trainer_state.json").write_text("{}")


def of_dcp(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(WEIGHTS, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)


def of_deepspeed(folder: Path) -> None:
    torch_file(folder / "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step7")


def pickled(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "state.pkl").write_bytes(b"\x80\x04N.")


FORMATS = [weights, sharded, of_trainer, of_dcp, of_deepspeed, pickled]


@pytest.mark.parametrize("write", FORMATS)
def test_a_whole_checkpoint_is_not_suspected(tmp_path: Path, write: Callable[[Path], None]) -> None:
    for number in (5, 10):
        write(tmp_path / f"checkpoint-{number}")
    (tmp_path / "latest").write_text("another-3")
    weights(tmp_path / "best-20")  # not one of the Trainer's
    assert why_unfinished(tmp_path / "best-20") == ""
    shutil.rmtree(tmp_path / "best-20")
    assert [why_unfinished(path) for _, path in program_checkpoints.numbered(tmp_path)] == ["", ""]
    assert list(program_checkpoints.set_aside(tmp_path)) == []


@pytest.mark.parametrize(
    ("write", "name", "expected"),
    [
        (weights, "model.safetensors", "model.safetensors is cut short"),
        (sharded, "model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors is cut short"),
        (of_trainer, "optimizer.pt", "optimizer.pt is cut short"),
        (of_trainer, "rng_state_0.pth", "rng_state_0.pth is cut short"),
        (of_trainer, "trainer_state.json", "trainer_state.json is cut short"),
        (of_deepspeed, "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt", "optim_states.pt is cut short"),
    ],
)
@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_file_that_ends_too_early_is_noticed(
    tmp_path: Path, write: Callable[[Path], None], name: str, expected: str, share: float
) -> None:
    write(tmp_path / "checkpoint-5")
    path = tmp_path / "checkpoint-5" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert expected in why_unfinished(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("write", "name", "expected"),
    [
        (sharded, "model-00002-of-00002.safetensors", "1 of 2 shards of model.safetensors"),
        (of_trainer, "trainer_state.json", "no trainer_state.json"),
        (of_dcp, "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0 has no .metadata"),
        (of_deepspeed, "latest", "checkpoint-10 has no file latest"),
    ],
)
def test_what_is_written_last_is_missed(
    tmp_path: Path, write: Callable[[Path], None], name: str, expected: str
) -> None:
    for number in (5, 10):
        write(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-10" / name).unlink()
    assert expected in why_unfinished(tmp_path / "checkpoint-10")
    assert program_checkpoints.newest(tmp_path) == (5, tmp_path / "checkpoint-5")


def test_a_program_knows_its_checkpoints_better(tmp_path: Path) -> None:
    for name in ("checkpoint-5", "checkpoint-10"):
        weights(tmp_path / name)
    results = [{"checkpoint_dir_name": "checkpoint-5", "metrics": {}}]
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps({"checkpoint_results": results}))
    assert "Ray Train does not know it" in why_unfinished(tmp_path / "checkpoint-10")
    for number in (5, 10):
        torch_file(tmp_path / f"deepspeed/global_step{number}/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "deepspeed/latest").write_text("global_step5")
    assert "latest names an earlier one" in why_unfinished(tmp_path / "deepspeed/global_step10")
    assert why_unfinished(tmp_path / "deepspeed/global_step5") == ""


def test_what_was_cut_short_is_moved_out_of_the_way_and_the_last_is_kept(tmp_path: Path) -> None:
    of_trainer(tmp_path / "checkpoint-5")
    for name in ("checkpoint-10", "checkpoint-15"):
        weights(tmp_path / name)
    said = list(program_checkpoints.set_aside(tmp_path))
    assert len(said) == 2
    assert f"{tmp_path}/checkpoint-15 was cut short (it has no trainer_state.json" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cut-short", "checkpoint-5"]
    assert [path.name for path in (tmp_path / ".cut-short").iterdir()] == ["checkpoint-10"]


def test_a_merge_refuses_what_was_cut_short_and_names_the_one_before(compose: Compose, tmp_path: Path) -> None:
    for name in ("checkpoint-5", "checkpoint-10"):
        weights(tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints/checkpoint-10/.unfinished").touch()
    config = put(compose("cluster=slurm", "pipeline=custom", 'custom.command="train.py"'), {"run_dir": str(tmp_path)})
    with pytest.raises(
        RunError, match=r"was cut short: it has the mark \.unfinished; for the one before, set consolidate\.step=5"
    ):
        of_program.run(config)
    for step, name in ((5, "checkpoint-5"), (10, "checkpoint-10")):
        config.consolidate.step = step
        assert of_program._select(config).name == name


def test_the_next_attempt_starts_before_what_was_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint-5", "checkpoint-10"):
        of_trainer(tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints/checkpoint-10/trainer_state.json").unlink()
    job = tmp_path / "jobs/custom"
    job.mkdir(parents=True)
    attempt.begin(job)
    assert "checkpoint-10 was cut short (it has no trainer_state.json" in capsys.readouterr().err
    assert attempts.begin_record(job, 1)["resumed"] == 5
    assert not (tmp_path / "checkpoints/checkpoint-10").exists()


@pytest.mark.slow
def test_a_trainer_that_is_killed_anywhere_in_its_save_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    monkeypatch.setenv("MUSTER_CHECKPOINTS", str(tmp_path / "out"))
    marked = []

    class Look(TrainerCallback):
        """Sees what is in the folder before the Trainer writes, and after."""

        def on_step_end(self, args, state, control, **more):  # type: ignore[no-untyped-def]
            marked.append(sorted(path.name for path in (tmp_path / "out").glob(f"checkpoint-{state.global_step}/*")))

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=4, save_steps=2, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=rows, callbacks=[trainer_callback(), Look()]).train()
    assert marked == [[], [".unfinished"], [], [".unfinished"]]
    whole = tmp_path / "out/checkpoint-4"
    assert program_checkpoints.newest(tmp_path / "out") == (4, whole)
    files = sorted((path for path in whole.iterdir()), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) > 5
    for number, last in enumerate(files):
        cut = tmp_path / "out/checkpoint-6"
        cut.mkdir()
        for path in files[: number + 1]:
            shutil.copy(path, cut)
        (cut / last.name).write_bytes(last.read_bytes()[: last.stat().st_size // 2])
        assert why_unfinished(cut), last.name
        shutil.rmtree(cut)
