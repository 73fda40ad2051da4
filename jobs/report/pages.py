"""Renders the HTML templates of this folder. Each page is one file that needs no other."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """The text of a page. All values are escaped. Raises jinja2.UndefinedError for a name that is not in `values`.

    The environment is not shared with tokenization/template_renderer.py: that one must not escape, treats undefined names as
    empty, and runs in a sandbox, because chat templates come from the Hub.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda part: f"{part:.1%}"
    environment.filters["count"] = lambda number: f"{number:,}"
    return environment.get_template(template).render(**values)
