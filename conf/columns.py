"""The columns by which a row's format is known: looked at before a run is queued, and again when rows are converted."""

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTION = ("instruction", "INSTRUCTION", "question", "query", "prompt")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "RESPONSE", "answer", "generation")
