"""Renders the HTML templates of this folder. Each page is one file that needs no other, and makes no request."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """The text of a page. All values are escaped. Raises jinja2.UndefinedError for a name that is not in `values`.

    A page runs no script but the one of this folder: its policy has the script's hash.

    The environment is not shared with tokenization/template_renderer.py: that one must not escape, treats undefined names as
    empty, and runs in a sandbox, because chat templates come from the Hub.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda part: f"{part:.1%}"
    environment.filters["count"] = lambda number: f"{number:,}"
    script = (TEMPLATES / "charts.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals["style"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))  # noqa: S704  # our own file
    environment.globals["charts_script"] = Markup(script)  # noqa: S704
    environment.globals["charts_script_hash"] = f"sha256-{digest}"
    return environment
