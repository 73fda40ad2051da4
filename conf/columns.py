"""Names the columns of each data format, and the notation for a range of rows. The launcher's checks and the jobs both use them."""

import re

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTION = ("instruction", "INSTRUCTION", "question", "query", "prompt")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "RESPONSE", "answer", "generation")

SPLIT = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")
"""A range of rows: `[:1000]`, `[10%:20%]`, `[-100:]`."""
