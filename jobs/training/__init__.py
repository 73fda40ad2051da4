"""Computes a training step: loss, optimizer, learning rate, loss scale, and the check for a diverged loss.

May import conf and every folder of jobs that jobs.model may import, and jobs.model itself.
"""
