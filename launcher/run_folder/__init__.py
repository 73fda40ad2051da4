"""Reads and writes what a run folder records: launches, attempts and statuses. May import `conf` and the standard library."""
