"""Other programs' words for Muster's keys, for the message about a key that does not exist; pure."""

from launcher.convert import axolotl, llamafactory, ms_swift, trl

OURS = {
    "lr": "`train.learning_rate`",
    "max_lr": "`train.learning_rate`",
    "epochs": "`train.epochs`",
    "batch_size": "`train.global_batch` (rows of a step on all GPUs), `train.micro_batch` (of one GPU)",
    "grad_accum": "`train.global_batch`; the accumulation follows from it",
    "gradient_accumulation": "`train.global_batch`; the accumulation follows from it",
    "seq_len": "`data.max_length`",
    "sequence_length": "`data.max_length`",
    "context_length": "`data.max_length`",
    "dataset_path": "`data.path`",
    "train_file": "`data.path`",
    "data.train": "`data.path`",
    "data.validation": "`data.validation_path`",
    "data.eval": "`data.validation_path`",
    "validation_file": "`data.validation_path`",
    "model_name": "`model.source`, with model=hub",
    "partition": "`cluster.partition`, for all jobs, or `cluster.train.partition`",
    "gpus": "`cluster.gpus`: GPUs on all nodes together",
    "num_gpus": "`cluster.gpus`: GPUs on all nodes together",
    "nproc_per_node": "`cluster.gpus`: GPUs on all nodes together",
    "nodes": "`cluster.gpus`, GPUs on all nodes together, or `cluster.train.nodes`",
    "nnodes": "`cluster.gpus`, GPUs on all nodes together, or `cluster.train.nodes`",
    "num_nodes": "`cluster.gpus`, GPUs on all nodes together, or `cluster.train.nodes`",
    "walltime": "`cluster.train.time_min`, in minutes",
    "time": "`cluster.train.time_min`, in minutes",
    "rank": "`adapter.r`",
    "lora_rank": "`adapter.r`",
    "target_modules": "`adapter.targets`",
    "zero_stage": "`parallel=zero1`, `zero2` or `zero3`",
    "num_workers": "`data.workers`",
    "hf_token": "`cluster.secrets=[HF_TOKEN]`",
    "wandb": "`tracker=wandb`",
}
"""A key that people type, or its last part -> Muster's words. The keys of other programs come from `launcher.convert`."""


def of(key: str) -> str | None:
    """What Muster has for a key of another program, or for a usual name: ": Muster's key is ...". None if nothing is known."""
    leaf = key.rsplit(".", 1)[-1].lower().lstrip("-")
    known: dict[str, str] = {}
    for module in (ms_swift, trl, llamafactory, axolotl):
        known |= {name: rule.description for name, rule in module.rules(8).items()}
    said = OURS.get(key.lower()) or OURS.get(leaf) or known.get(leaf)
    if said is None:
        return None
    if said.startswith(("refused: ", "not needed: ")):
        return f": {said.split(': ', 1)[1]}"
    return f": use {said.replace('`', '')}"
