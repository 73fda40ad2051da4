"""Reads a JSON file that somebody else may have written, and says why it cannot be read."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(the object in a JSON file, why it cannot be read); both None if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return (content, None) if isinstance(content, dict) else (None, f"{path.name} is not a JSON object")
