"""Refuses jobs whose inputs are missing or cannot be read: files, chat template, tokens, prompts, checkpoints of the run; pure."""

import math
from collections.abc import Iterator

from conf.chat_templates import BUNDLED
from conf.choices import Executor, Format
from conf.columns import MESSAGES
from conf.datasets import training
from conf.errors import Problem
from conf.held_out import BEST
from conf.schema import Config
from launcher.check.inputs import Inputs, RunFolder

CHATS = (Format.sharegpt, Format.messages)


def problems(config: Config, inputs: Inputs, columns: Iterator[tuple[str, ...] | None]) -> Iterator[Problem]:
    """Every input that a job would miss. `columns` are those of the first row of each training set, as far as they are known."""
    preprocesses = "preprocess" in config.jobs and not (inputs.run and inputs.run.has_data)
    if preprocesses:
        for key, path, why in inputs.files:
            yield Problem(key, path, why)
        yield from _template(config, inputs, list(columns))
        yield from _tokens(config, inputs)
    if inputs.prompts:
        yield Problem("generate.prompts", config.generate.prompts, inputs.prompts)
    if "train" in config.jobs:
        yield from _warmup(config, inputs.most_rows)
    if inputs.run is not None:
        yield from _earlier_jobs(config, inputs.run)
        yield from _resume_step(config, inputs.run)


def _template(config: Config, inputs: Inputs, columns: list[tuple[str, ...] | None]) -> Iterator[Problem]:
    template = config.data.chat_template
    if inputs.template:
        yield Problem("data.chat_template", template, inputs.template)
    missing = [token for token in BUNDLED.get(template or "", ()) if token in inputs.tokens_missing]
    if missing:
        message = f"needs the tokens {', '.join(missing)}, which the tokenizer does not have. Use the template of the model's "
        message += f"family, or add them: 'data.special_tokens=[{','.join(repr(token) for token in missing)}]'"
        yield Problem("data.chat_template", template, message)
    sets = zip(training(config.data).values(), columns, strict=False)
    chats = any(_is_chat(data_set.format, names) for data_set, names in sets)
    if template is None and inputs.has_template is False and chats:
        message = "is not set, and the tokenizer has no chat template, but the rows are chats. "
        yield Problem("data.chat_template", "null", f"{message}Set it to one of {', '.join(BUNDLED)}, or to a file")


def _is_chat(format: Format | None, columns: tuple[str, ...] | None) -> bool:
    return format in CHATS or (format in (None, Format.auto) and bool(set(columns or ()) & set(MESSAGES)))


def _tokens(config: Config, inputs: Inputs) -> Iterator[Problem]:
    data = config.data
    named = [
        ("eos_token", data.eos_token),
        ("pad_token", data.pad_token),
        *(("end_of_turn", token) for token in data.end_of_turn),
    ]
    for key, token in named:
        if token in inputs.tokens_missing:
            message = f"is not a token of the tokenizer. Correct it, or add it too: 'data.special_tokens=[{token!r}]'"
            yield Problem(f"data.{key}", token, message)


def _warmup(config: Config, most_rows: float | None) -> Iterator[Problem]:
    train = config.train
    if most_rows is None or train.steps is not None or train.epochs is None or train.warmup_steps is None:
        return
    steps = math.ceil(most_rows * train.epochs / train.global_batch)
    if train.warmup_steps >= max(2, steps):
        message = f"must be below the steps of training, at most {steps} here ({train.epochs:g} epochs of {most_rows:g} rows in "
        message += f"batches of {train.global_batch}). Lower it, use train.warmup_ratio=0.03, or train longer"
        yield Problem("train.warmup_steps", train.warmup_steps, message)


def _earlier_jobs(config: Config, run: RunFolder) -> Iterator[Problem]:
    """Jobs that read what a job wrote that is neither asked for nor done in this run folder."""
    jobs, where = set(config.jobs), f"run_dir={config.run_dir}"
    remedy = "Name a run that has it: muster resume RUN, or resume=RUN"
    is_started_now = (
        config.cluster.executor is Executor.local
    )  # on a cluster, rows may be put there while the job waits
    if "train" in jobs and "preprocess" not in jobs and not run.has_data and is_started_now:
        message = f"train reads the rows that preprocess writes, and there are none in {where}. Use pipeline=train"
        yield Problem("jobs", "train", message)
    if "consolidate" in jobs and "train" not in jobs and config.custom.command is None:
        if not run.steps:
            remedy = (
                f"Train it first: muster resume {config.run_dir} pipeline=finetune"
                if config.resume
                else "Name the run: muster merge RUN"
            )
            message = f"there is no checkpoint to merge in {where}. {remedy}"
            yield Problem("jobs", "consolidate", message)
        elif config.consolidate.step not in (None, BEST, *run.steps):
            saved = ", ".join(str(step) for step in run.steps[-8:])
            message = f"there is no checkpoint of this step in {where}. Use one of {saved}, or null for the newest"
            yield Problem("consolidate.step", config.consolidate.step, message)
    for name in ("evaluate", "generate"):
        if name in jobs and "consolidate" not in jobs and not run.has_model:
            message = f"there is no merged model in {where}. Merge it first: muster merge RUN. {remedy}"
            yield Problem("jobs", name, message)
    if "evaluate" in jobs and "preprocess" not in jobs and not run.has_data:
        message = f"evaluate reads the rows that preprocess writes, and there are none in {where}. {remedy}"
        yield Problem("jobs", "evaluate", message)


def _resume_step(config: Config, run: RunFolder) -> Iterator[Problem]:
    step, key = config.train.resume_step, "train.resume_step"
    if step is None:
        return
    if config.custom.command is not None:
        message = "a program of your own chooses its checkpoint itself. Move the newer ones out of RUN/checkpoints"
        yield Problem(key, step, message)
    elif config.resume is None:
        yield Problem(
            key, step, f"is for a run that has checkpoints. Name it: muster resume RUN train.resume_step={step}"
        )
    elif "train" not in config.jobs:
        message = (
            f"has no effect without the job train. To merge this checkpoint: muster merge RUN consolidate.step={step}"
        )
        yield Problem(key, step, message)
    elif step not in run.steps:
        saved = f"Use one of {', '.join(map(str, run.steps[-8:]))}" if run.steps else "The run has none yet"
        yield Problem(key, step, f"there is no checkpoint of this step in run_dir={config.run_dir}. {saved}")
