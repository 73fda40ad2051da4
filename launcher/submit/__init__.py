"""Renders, previews and starts the jobs of a run, on Slurm or on this machine.

May import `conf`, submitit, jinja2 and every other folder of the launcher.
"""
