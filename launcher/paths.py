"""The folder in which Muster itself lies."""

from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
"""The clone of the repository: the folder of launch.py, conf/, jobs/ and launcher/."""
