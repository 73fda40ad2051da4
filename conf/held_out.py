"""Whether a run looks at held-out rows while it trains, and what follows from their loss."""

from conf.schema import Config

BEST = "best"
"""`consolidate.step=best`: the checkpoint with the lowest held-out loss."""


def keeps_best(config: Config) -> bool:
    """Whether training saves and keeps the checkpoint with the lowest held-out loss."""
    train = config.train
    return train.keep_best or train.early_stopping.patience is not None or config.consolidate.step == BEST
