"""Starts and supervises the user's own training program: its command, environment, output, stop and checkpoints."""
