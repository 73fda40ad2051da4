"""Muster: fine-tune an LLM on a SLURM cluster with one command. This package holds the command; the code lies beside it."""

__version__ = "0.1.0"
