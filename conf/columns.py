"""How rows are known: the columns of each format, and the notation of a part of them; read on both sides of a launch."""

import re

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTION = ("instruction", "INSTRUCTION", "question", "query", "prompt")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "RESPONSE", "answer", "generation")

SPLIT = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")
"""`[:1000]`, `[10%:20%]`, `[-100:]`."""
