"""What a training program under `pipeline=custom` may call: `beat` and `stop_requested`. Standard library; torch if it is in use.

Outside of Muster both do nothing, so that a program runs unchanged by hand.
"""

from __future__ import annotations  # the program's own Python may be 3.9

import faulthandler
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
"""A file in a folder of RUN/checkpoints while it is written: Muster takes the folder for no checkpoint."""
_group: Any = None
_stacks: Any = None


def beat(step: int | None = None, phase: str = "train") -> None:
    """Say that the program makes progress. After the first call, `cluster.network.step_timeout_s` limits its silence.

    `phase`: train, evaluate or save. A save may take `cluster.network.save_timeout_s`.
    """
    folder = os.environ.get("MUSTER_BEATS")
    if folder:
        path = Path(folder) / os.environ.get("RANK", "0")
        try:
            if _stacks is None and "MUSTER_RANKS" in os.environ:
                _write_stacks_when_asked(path.with_suffix(".stack"))
            path.with_suffix(".new").write_text(f"{phase} {'' if step is None else step}", encoding="utf-8")
            path.with_suffix(".new").replace(path)
        except OSError:  # a full disk must not end a training
            return


def _write_stacks_when_asked(path: Path) -> None:
    """Let SIGQUIT write the stacks of all threads to a file. Ray catches the signal that does this under other launchers."""
    global _stacks
    _stacks = path.open("w", encoding="utf-8")
    _stacks.write(f"{threading.get_ident():016x}\n")
    _stacks.flush()
    faulthandler.register(signal.SIGQUIT, _stacks, all_threads=True)


def stop_requested() -> bool:
    """Whether the program should save and end. With torch.distributed, all ranks call this equally often and get one answer."""
    stop = os.environ.get("MUSTER_STOP_FILE")
    here = bool(stop) and Path(str(stop)).exists()
    torch: Any = sys.modules.get("torch")
    distributed = torch.distributed if torch else None
    if not stop or distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return here
    global _group
    if _group is None:  # Gloo needs no GPU, so a step need not wait for the last one
        _group = distributed.new_group(backend="gloo")
    answer = torch.tensor(int(here))
    distributed.all_reduce(answer, op=distributed.ReduceOp.MAX, group=_group)
    return bool(answer.item())


class _Events:
    """What the callback does at the events of a Trainer. It needs no transformers: `trainer_callback` adds the base class."""

    def __init__(self) -> None:
        self.mark: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if args.world_size < ranks:
            raise RuntimeError(
                f"the Trainer trains alone on each of {ranks} ranks (it counts {args.world_size}). On nodes without GPUs, "
                'set TrainingArguments(ddp_backend="gloo")'
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if stop_requested():
            control.should_save = control.should_training_stop = True
        beat(state.global_step, "save" if control.should_save else "train")
        self._mark(args, state, control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._mark(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._unmark()

    on_step_begin = on_train_end = on_save  # the Trainer may have decided against the save

    def _mark(self, args: Any, state: Any, control: Any) -> None:
        """Mark the folder that the Trainer is about to write: a kill leaves half a checkpoint there."""
        if control.should_save and state.is_world_process_zero and "MUSTER_CHECKPOINTS" in os.environ:
            self.mark = Path(args.output_dir) / f"checkpoint-{state.global_step}" / UNFINISHED
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.touch()

    def _unmark(self) -> None:
        if self.mark:
            with suppress(OSError):
                self.mark.unlink(missing_ok=True)
                self.mark.parent.rmdir()  # fails if the Trainer has saved
            self.mark = None


def trainer_callback() -> Any:
    """A callback for transformers' and TRL's Trainers: beats at each step; saves and ends when the program should stop."""
    from transformers import TrainerCallback

    return type("MusterCallback", (_Events, TrainerCallback), {})()
