"""Reads the DeepSpeed JSON that `parallel.deepspeed_config` names."""

import json
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Problem, first_line

KEY = "parallel.deepspeed_config"


def read(path: str) -> dict[str, Any]:
    """The settings in a file. Raises ConfigError for a file that cannot be read, is not JSON, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(Problem(KEY, path, f"has the key {twice} twice in one section. Remove one of them"))
        return dict(pairs)

    try:
        settings = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            Problem(KEY, path, f"cannot be read: {first_line(error)}. Give the path of a JSON file")
        ) from None
    except ValueError as error:
        raise ConfigError(Problem(KEY, path, f"is not JSON: {error}. Correct that line")) from None
    if not isinstance(settings, dict):
        raise ConfigError(Problem(KEY, path, "is not a JSON object. Write {...} with DeepSpeed's keys"))
    return settings


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both settings, section by section. Where both have a value, that of `above` counts."""
    result = dict(below)
    for name, value in above.items():
        section = result.get(name)
        result[name] = merged(section, value) if isinstance(section, dict) and isinstance(value, dict) else value
    return result
