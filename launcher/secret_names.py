"""Recognizes secrets: variables by their names, and values by the forms of known tokens, URLs and keys. Pure."""

import re
from collections.abc import Iterator, Mapping

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
SECRET_WORDS = frozenset(
    ("TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE", "PASSCODE", "PASS", "PWD", "PW", "CREDENTIAL",
     "CREDENTIALS", "CRED", "CREDS", "APIKEY", "KEY", "KEYS", "AUTH", "AUTHORIZATION", "OAUTH", "BEARER", "COOKIE", "COOKIES",
     "JWT", "PAT", "DSN", "SAS", "SIG", "SIGNATURE", "WEBHOOK", "NETRC", "CONNSTR")
)  # fmt: skip
SECRET_ENDS = (
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "APIKEY",
    "ACCESSKEY",
    "SECRETKEY",
    "AUTH",
    "PWD",
    "PASS",
)
"""Ends of words that are written together, as in PGPASSWORD, SSHPASS and MYAUTH."""
PLAIN_WORDS = frozenset(("OLDPWD", "COMPASS", "BYPASS", "SURPASS"))
PLAIN_NAMES = re.compile(
    r"PWD|.*(FILE|PATH|DIR|FOLDER|SOCK|TYPE|SIZE|COUNT|LIMIT|LENGTH|TIMEOUT|TTL|METHOD|ENABLED)S?"
    r"|(.*_)?(PAD|EOS|BOS|UNK|MASK|SEP|CLS|IMAGE|IMPLICIT|MAX|NUM|PER)_TOKEN(_IDS?)?",
    re.IGNORECASE,
)
"""Names that hold such a word, but whose values say where a secret is, how long, of which kind, or are about a model's tokens."""
PLAIN_VALUES = re.compile(r"|0|1|true|false|yes|no|on|off|none|null|\*+|<.*>|[$].*", re.IGNORECASE)
"""A switch, a placeholder, or the name of another variable."""
PATH_NAMES = re.compile(r"CREDENTIALS?$|KEY$|NETRC$|COOKIES?$", re.IGNORECASE)
"""Variables that may hold a path instead: GOOGLE_APPLICATION_CREDENTIALS."""

FORMS = {
    "a token of the Hugging Face Hub": r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
    "a key of OpenAI or Anthropic": r"\bsk-(?:proj-|ant-|or-|svcacct-|live-)?[A-Za-z0-9_]{16,}[A-Za-z0-9_-]*",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,})",
    "a token of GitLab": r"\bgl(?:pat|dt|rt|ptt|soat)-[A-Za-z0-9_-]{16,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of Slack": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[A-Za-z0-9/]+",
    "a key of Google": r"\bAIza[A-Za-z0-9_-]{30,}|\bya29\.[A-Za-z0-9_-]{16,}",
    "a token": r"\b(?:nvapi-|pypi-|dckr_pat_|npm_|gsk_|r8_|wandb_v\d_|local-|dapi|shpat_|sk_live_|rk_live_)[A-Za-z0-9_-]{20,}",
    "a web token": r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*-----END [A-Z ]*PRIVATE KEY-----)?",
    "a URL with a password": r"(?<=://)[^\s/?#@:\"']*:(?!\$)[^\s/?#\"']+(?=@(?!sha256:))",
    "a URL with a token": r"(?<=https://)[^\s/?#@:\"'$]{16,}(?=@)",
    "an authorization header": r"(?i)(?<=\bbearer )[A-Za-z0-9_.=+/-]{8,}|(?<=authorization: basic )[A-Za-z0-9=+/]{6,}",
    "a key of W&B": r"(?i)(?<![0-9a-f])(?<![/@])[0-9a-f]{40}(?![0-9a-f])",
}
"""What it is -> the form of its value. The key of W&B has the form of a commit; see `found`."""
COMPILED = {kind: re.compile(form) for kind, form in FORMS.items()}
QUERY = re.compile(r"[?&]([\w.-]+)=([^&\s#\"']+)")
VALUE = r"""(['"]?)([^\s'",;]+)"""
ASSIGNMENT = re.compile(rf"""(?:^|(?<=[\s,;'"{{(]))([A-Za-z_]\w*)={VALUE}""")
OPTION = re.compile(rf"(?:^|(?<=\s))--([A-Za-z][\w-]*)(?:=|\s+){VALUE}")
IN_CODE = re.compile(rf"""(?:^|(?<=[\s,;'"{{(+-]))([A-Za-z_]\w*)['"]?\s*[:=]\s*{VALUE}""")
LITERAL = re.compile(r"(?=[^\d]*\d)[A-Za-z0-9+/_=.-]{12,}")
MASK = "(hidden)"


def is_secret(name: str) -> bool:
    """Whether the value of a variable with this name must not be written to a file or log (HF_TOKEN: yes; MAX_TOKENS: no)."""
    if PLAIN_NAMES.fullmatch(name):
        return False
    words = {word.upper() for word in WORD.findall(name)} - PLAIN_WORDS
    return bool(words & SECRET_WORDS) or any(word.endswith(SECRET_ENDS) for word in words)


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable of this name has a secret as its value: a switch, a path to it or the name of another one is none."""
    return not _is_plain(name, value) and (is_secret(name) or any(True for _ in found(value)))


def _is_plain(name: str, value: str) -> bool:
    is_path = value.startswith(("/", "~/")) and PATH_NAMES.search(name)
    return bool(is_path or PLAIN_VALUES.fullmatch(value))


def known_values(environ: Mapping[str, str], names: frozenset[str] = frozenset()) -> dict[str, str]:
    """The variables of this process that hold secrets: those in `names`, and those that look like it."""
    return {
        name: value
        for name, value in environ.items()
        if value and (name in names or (len(value) >= 8 and is_secret(name) and holds_secret(name, value)))
    }


def found(text: str, known: Mapping[str, str] | None = None, *, is_code: bool = False) -> Iterator[tuple[str, str]]:
    """(what it is, the secret) for each secret in a text.

    `known` are secrets by their names; a short one counts only if it is the whole text. In code, names are also those of
    ordinary variables, so an assignment counts only with a value that looks random; and a commit has the form of a key of W&B.
    """
    for name, value in (known or {}).items():
        if value == text or (len(value) >= 8 and value in text):
            yield f"the value of {name}", value
    for kind, form in COMPILED.items():
        if kind != "a key of W&B" or not is_code or re.search(r"(?i)wandb|key|token|login", text):
            yield from ((kind, match[0]) for match in form.finditer(text))
    for match in QUERY.finditer(text):
        if is_secret(match[1]) and not PLAIN_VALUES.fullmatch(match[2]):
            yield "a signed URL", match[2]
    for form in (OPTION, IN_CODE if is_code else ASSIGNMENT):
        for match in form.finditer(text):
            name, value = match[1], match[3]
            if is_secret(name) and not _is_plain(name, value) and (not is_code or LITERAL.fullmatch(value)):
                yield f"a value of {name}", value


def masked(text: str, known: Mapping[str, str] | None = None, *, is_code: bool = False) -> str:
    """The text with `(hidden)` instead of each secret."""
    for _, secret in sorted(found(text, known, is_code=is_code), key=lambda item: -len(item[1])):
        text = text.replace(secret, MASK)
    return text
