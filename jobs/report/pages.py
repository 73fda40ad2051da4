"""Fills the templates of jobs/pages: each page is one file that needs no other."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def filled(template: str, **values: Any) -> str:
    """The text of a page; what is put in is escaped, and a name that `values` lacks is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["share"] = lambda part: f"{part:.1%}"
    made.filters["count"] = lambda number: f"{number:,}"
    return made.get_template(template).render(**values)
