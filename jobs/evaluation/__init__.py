"""Loads the consolidated model, compares its logits with those of training, and finds faults in its answers.

May import `conf` and the folders of jobs up to `jobs.checkpoint` in the order of tests/test_layers.py.
"""
