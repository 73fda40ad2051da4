"""The form of the lines in a rank's log."""

import re

LOG_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank \d+ ([A-Z]+) ")
"""Start of every line in a rank's log, written by jobs/distributed/logs.py: time, rank and level."""
