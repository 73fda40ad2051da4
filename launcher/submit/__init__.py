"""Renders and submits jobs, on Slurm or here."""
