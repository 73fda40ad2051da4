"""Where Muster's own files lie."""

from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
