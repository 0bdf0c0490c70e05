"""The check as one page: ``deepdoctor data rows.jsonl --page check.html``.

The page fetches nothing and runs nothing. Both languages stand in it and a pair of radio buttons shows one of them.
Rows are quoted as text, escaped; a row that seems to hold personal data is named and never quoted.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepdoctor.data.findings_text import FIELDS, personal_data
from deepdoctor.data.page_text import MEANING, REMEDY, WORDS, Both
from deepdoctor.data.rows import Row
from deepdoctor.errors import RunError
from deepdoctor.pages import svg_element, template_environment

if TYPE_CHECKING:
    from deepdoctor.data.prompt import EncodedRow

__all__ = ["histograms", "write_page"]

EXAMPLES = 3
MOST_PLACES = 200
MOST_CHARACTERS = 700
BINS = 32
WIDTH = {"wide": 880, "narrow": 360}  # px
BAR, LIMIT, MUTED, LINE = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {BAR: "--accent", LIMIT: "--warn", MUTED: "--muted", LINE: "--line"}
OTHER_ROW = re.compile(r"(?:first in|like) (.+?)(?:, likeness of .*)?")
UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_page(
    path: Path, check: Mapping[str, Any], kept: Sequence[tuple[Row, EncodedRow]], rows: Sequence[Row]
) -> None:
    """Write the page; it appears whole or not at all.

    check: contents of check.json. kept: the kept rows with their tokens. rows: all rows as the source holds them now;
    where they are not those that were checked, or none, the page quotes no row. Raises RunError where the file cannot
    be written.
    """
    environment = template_environment(Path(__file__).parent / "templates")
    encoded = [tokens for _, tokens in kept]
    environment.filters["code"] = _code
    lengths = {
        "row": [len(row.input_ids) for row in encoded],
        "reasoning": [row.reasoning[1] - row.reasoning[0] for row in encoded],
        "answer": [row.answer[1] - row.answer[0] for row in encoded],
    }
    charts = {
        part: {size: histograms(part, values, check["max_seq_len"], size) for size in WIDTH}
        for part, values in lengths.items()
        if values
    }
    page = environment.get_template("check.html.j2").render(
        view=_view(check, _known(check, kept, rows)), w=WORDS, charts=charts, tokens=check["tokens"]
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}", "give `--page` a file in a folder that exists"
        ) from None


def histograms(part: str, values: Sequence[int], limit: int, size: str) -> str:
    """Return the lengths of one part of the rows as an ``<svg>`` element: tokens to the right, rows upwards.

    part: names the chart. values: at least one length. limit: max_seq_len, marked where the bars come near it. size:
    "wide" (880 px) or "narrow" (360 px). Colours are CSS variables, text stays text.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = WIDTH[size], 150
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((52 / width, 26 / height, (width - 70) / width, (height - 38) / height))
    top = max(values)
    counts, edges = np.histogram(values, bins=min(BINS, top + 1), range=(0, top + 1))
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=BAR, linewidth=0)
    if part == "row" and limit <= 1.25 * top:
        axes.axvline(limit, color=LIMIT, linewidth=1.5, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(top + 1, limit * 1.02 if part == "row" and limit <= 1.25 * top else 0))
    axes.xaxis.set_major_locator(MaxNLocator(4 if size == "narrow" else 8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=MUTED, pad=5)
    return svg_element(figure, f"{part}-{size}", VARIABLES)


def _view(check: Mapping[str, Any], known: Mapping[int, Row]) -> dict[str, Any]:
    """Everything the template prints; texts are plain, escaping is the template's."""
    by_code: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for finding in check["findings"]:
        by_code[finding["code"]].append(finding)
    read, limit = check["rows_read"], check["max_seq_len"]
    return {
        "source": _clean(check["source"]),
        "subtitle": f"max_seq_len {limit:,} · train_on {check['train_on']}",
        "tiles": [
            (f"{read:,}", WORDS["read"]),
            (f"{check['rows_kept']:,}", WORDS["kept"]),
            (f"{check['rows_dropped']:,}", WORDS["dropped"]),
            (f"{check['tokens']['row']['total']:,}", WORDS["tokens"]),
            (f"{check['label_tokens']:,}", WORDS["trained"]),
        ],
        "longest_row": check["longest_row"] if check["longest_row"] > limit else None,
        "findings": [
            _finding(code, counts, by_code[code], read, check["source"], known)
            for code, counts in check["counts"].items()
        ],
        "examples": bool(known),
        "openings": [
            {"words": _clean(opening["words"]), "rows": f"{opening['rows']:,}", "share": _percent(opening["share"])}
            for opening in check.get("openings", ())
        ],
    }


def _known(check: Mapping[str, Any], kept: Sequence[tuple[Row, EncodedRow]], rows: Sequence[Row]) -> dict[int, Row]:
    """The rows by index, where they are still those that were checked."""
    known = {row.index: row for row in rows}
    same = len(rows) == check["rows_read"] and all(known.get(row.index) == row for row, _ in kept)
    return known if same else {}


def _finding(
    code: str,
    counts: Mapping[str, int],
    findings: Sequence[Mapping[str, Any]],
    read: int,
    source: str,
    known: Mapping[int, Row],
) -> dict[str, Any]:
    places = [_clean(finding["place"].removeprefix(source).removeprefix(":")) for finding in findings]
    return {
        "code": code,
        "meaning": MEANING.get(code, (code, code)),
        "remedy": REMEDY.get(code) or _doubt(code, counts),
        "dropped": f"{counts['dropped']:,}",
        "kept": f"{counts['kept']:,}",
        "share": _percent((counts["dropped"] + counts["kept"]) / read),
        "places": ", ".join(places[:MOST_PLACES]),
        "more": f"{len(places) - MOST_PLACES:,}" if len(places) > MOST_PLACES else "",
        "examples": [
            _example(finding, place, known) for finding, place in zip(findings[:EXAMPLES], places, strict=False)
        ],
    }


def _doubt(code: str, counts: Mapping[str, int]) -> Both:
    if counts["dropped"]:
        return (
            f"Dropped because `data.drop` names `{code}`.",
            f"因 `data.drop` 列出了 `{code}` 而去除。",
        )
    return (
        f"Kept. `data: {{drop: [{code}]}}` in the recipe, or `--data.drop {code}`, leaves such rows out.",
        f"保留。在配方中写 `data: {{drop: [{code}]}}`，或用 `--data.drop {code}`，即可去除这些行。",
    )


def _example(finding: Mapping[str, Any], place: str, known: Mapping[int, Row]) -> dict[str, Any]:
    row = known.get(finding["index"])
    masked = row is not None and personal_data(row) is not None
    texts = [] if row is None or masked else [(WORDS[field], _excerpt(getattr(row, field))) for field in FIELDS]
    if texts and (match := OTHER_ROW.fullmatch(finding["detail"])):
        other = next((row for row in known.values() if row.place == match.group(1)), None)
        if other is not None and not personal_data(other):
            texts.insert(0, (WORDS["first_row"], _excerpt(other.question)))
    detail = "" if masked and finding["code"] != "personal_data" else _clean(finding["detail"])
    return {"place": place, "detail": detail, "masked": masked, "texts": texts}


def _excerpt(text: str) -> str:
    """Both ends of a long text: where a reasoning ends is where it says what follows."""
    text = _clean(text).strip()
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} …]\n{text[-half:]}"


def _code(text: str) -> Any:
    """Plain text with `words` between backticks as code elements."""
    from markupsafe import Markup, escape

    pieces = [
        Markup("<code>{}</code>").format(part) if n % 2 else escape(part) for n, part in enumerate(text.split("`"))
    ]
    return Markup("").join(pieces)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\u00a0%" if share < 0.1 else f"{100 * share:.1f}\u00a0%"


def _clean(text: str) -> str:
    """Text fit for a page: control characters and lone surrogates become U+FFFD."""
    return UNFIT.sub("\ufffd", text.replace("\r\n", "\n"))
