"""Programs of examples/custom on ranks without Slurm: what they made of the environment of a job, and how they trained.

observed.py   runs such a program in its own process, and writes what it did
plain.py      the same training in one process: plain transformers and torch
__main__.py   starts the job `custom` on two ranks for each case, and compares the two
"""
