"""Runs beside the ranks on compute nodes: attempts, worker, watchdog, diagnosis, requeue."""
