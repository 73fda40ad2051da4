"""Runs beside the ranks on compute nodes: starts attempts, watches for hangs, diagnoses failures and requeues the job.

May import `conf`, `launcher.run_folder`, launcher's own files, and `jobs` only inside `worker.run`.
"""
