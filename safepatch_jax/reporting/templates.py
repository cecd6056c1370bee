"""Markdown from templates: a report's page as it looks, in a file beside the module that fills it.

Templates use functions of `reporting.tables` as filters. A name that is not given is an error. What
is filled in is never taken for a template itself.
"""

from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING, Any

from safepatch_jax.reporting import tables

if TYPE_CHECKING:
    import jinja2

ROOT = pathlib.Path(__file__).parents[1]


def render(name: str, /, **values: Any) -> str:
    """Fill a template; the text ends with one newline.

    Args:
      name: its path in this package, such as 'run/report.md.jinja'.
    """
    return _environment().get_template(name).render(values).rstrip("\n") + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2  # here: what lists a sweep's points need not wait for it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (
        line,
        tables.counted,
        tables.escaped,
        tables.number,
        tables.percent,
        tables.rate,
    ):
        environment.filters[function.__name__] = function
    environment.globals["table"] = tables.table
    return environment


def line(text: str) -> str:
    """Join the lines of a paragraph, so that a template need not have long ones."""
    return " ".join(line.strip() for line in text.strip().split("\n")) + "\n"
