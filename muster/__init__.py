"""Muster: fine-tune an LLM on a SLURM cluster with one command. This package holds the command; the code lies beside it.

A training program of the user imports `beat`, `stop_requested` and `trainer_callback` from here; see docs/own-trainer.md.
"""

from muster.program import beat, stop_requested, trainer_callback

__all__ = ["beat", "stop_requested", "trainer_callback"]
__version__ = "0.1.0"
