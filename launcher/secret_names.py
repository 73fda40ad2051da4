"""Which environment variables hold secrets, by their names."""

import re

SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds what must not be written down (HF_TOKEN does, MAX_TOKENS does not)."""
    return SECRET.search(name) is not None
