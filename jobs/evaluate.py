"""Computes the held-out loss of the consolidated model, loaded as a user would load it: whole, or a base with its adapter."""

import logging
import math
from pathlib import Path

from conf.batch import micro_batch_limit
from conf.files import write_json
from conf.schema import Config
from jobs.data import batches
from jobs.distributed.process_group import World
from jobs.evaluation.load_model import describe, load
from jobs.tokenization.tokenizer import load_tokenizer
from jobs.training import loss

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/evaluate.json: mean loss over the held-out tokens, perplexity, number of tokens, and the model.

    If nothing is held out (data.validation_fraction=0), loss and perplexity are null.
    """
    rows = batches.load_split(Path(config.run_dir) / "data", "validation")
    if not len(rows):
        nothing = {"loss": None, "perplexity": None, "tokens": 0, "model": describe(config)}
        write_json(Path(config.run_dir) / "evaluate.json", nothing)
        log.info("no rows are held out (data.validation_fraction=0), so there is no held-out loss")
        return
    model = load(config)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=model.device)
    pad = load_tokenizer(config).pad_token_id
    sums = loss.evaluate(model, rows, micro_batch_limit(config), pad, world)
    assert sums is not None  # nobody asks it to stop
    loss_sum, tokens = sums.tolist()
    result = {
        "loss": loss_sum / tokens,
        "perplexity": math.exp(min(loss_sum / tokens, 700)),  # exp(710) overflows
        "tokens": int(tokens),
        "model": describe(config),
    }
    write_json(Path(config.run_dir) / "evaluate.json", result)
    log.info(
        f"held-out loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f} over {result['tokens']} tokens"
    )
