"""The templates of the pages, and the styles and scripts that stand in them."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **content: object) -> str:
    """Fill a template in. All that comes from a model or from data is escaped."""
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**content)


def inlined(*names: str) -> Markup:
    """Return files of this folder, to stand in a page as they are."""
    return Markup("\n".join(map(_text, names)))


def _text(name: str) -> str:
    return files("twofold.report").joinpath(name).read_text(encoding="utf-8")
