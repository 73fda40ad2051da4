"""Measures a training and reports it: metrics, trackers, FLOPs, step times, stragglers and profiler traces.

May import conf and the folders of jobs that come before it in tests/test_layers.py. Never imports backends or checkpoint.
"""
