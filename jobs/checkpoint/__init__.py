"""Saves checkpoints, in the background too; checks, deletes and resumes them, in any layout.

May import `conf` and the folders of jobs from `distributed` to `backends`, in the order of tests/test_layers.py.
"""
