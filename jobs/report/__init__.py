"""Renders HTML pages about the data, the training and the answers of a run; each page needs no other file.

May import `conf` and the folders of jobs up to `jobs.training` in the order of tests/test_layers.py.
"""
