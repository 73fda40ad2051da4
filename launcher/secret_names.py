"""Recognizes environment variables that hold secrets by their names."""

import re

SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether the value of a variable with this name must not be written to a file or log (HF_TOKEN: yes; MAX_TOKENS: no)."""
    return SECRET.search(name) is not None
