"""What self-contained pages are made of: templates that escape, and charts as SVG text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

__all__ = ["svg_element", "template_environment"]


def template_environment(folder: Path) -> Environment:
    """Return Jinja over the templates of a folder: everything is escaped, an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def svg_element(figure: Figure, name: str, variables: Mapping[str, str]) -> str:
    """Return the figure as one ``<svg>`` element: text stays text, ids are the chart's own, no global style.

    name: another for each chart of a page. variables: colour drawn with -> CSS variable to stand for it.
    """
    import matplotlib

    target = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters the measuring font lacks are drawn by the reader's own
        figure.savefig(target, format="svg", metadata=nothing, transparent=True)
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata\b.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # Matplotlib 3.9
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # 3.10
    svg = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", svg)
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
