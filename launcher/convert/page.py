"""Writes the tables of docs/coming-from.md from the rules: `python -m launcher.convert.page`."""

from pathlib import Path

from launcher.convert import convert, sharding_keys, trainer_keys
from launcher.convert.keys import Rule
from launcher.paths import CLONE

PAGE = CLONE / "docs" / "coming-from.md"
MARK = "<!-- The tables below are written by `python -m launcher.convert.page`. -->"


def tables() -> str:
    """A table for each program: its key, and Muster's word for it."""
    parts = []
    trainer = trainer_keys.rules(8)
    for name, title in convert.TITLES.items():
        rules = convert.PROGRAMS[name].rules(8)
        own = {key: rule for key, rule in rules.items() if name == "axolotl" or key not in trainer}
        parts.append(_table(f"## {title}", own))
    parts.append(_table("## Trainer (LLaMA-Factory, TRL and ms-swift pass these on)", trainer))
    parts.append(_table("## DeepSpeed's JSON", sharding_keys.DEEPSPEED))
    return "\n\n".join(parts) + "\n"


def _table(title: str, rules: dict[str, Rule]) -> str:
    rows = [f"| `{key}` | {rule.description.replace('|', chr(92) + '|')} |" for key, rule in sorted(rules.items())]
    return "\n".join([title, "", "| key | Muster |", "|---|---|", *rows])


def text(page: Path = PAGE) -> str:
    """The page with new tables; what stands above them is kept."""
    above = page.read_text(encoding="utf-8").split(MARK)[0]
    return f"{above}{MARK}\n\n{tables()}"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
