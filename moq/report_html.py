"""Small pieces of the report: text, numbers, tables and sections as HTML, everything escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

#: Between a number and its unit: no line ends there.
SPACE, NARROW = "\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}"


def prose(text: str) -> str:
    """Escapes a text; what stands between backticks becomes code.

    Example:
        >>> prose("`a < b` & so on")
        '<code>a &lt; b</code> &amp; so on'
    """
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def number(value: float | None, digits: int = 3) -> str:
    """Writes a number for people: `digits` significant ones, thousands apart; a dash for None.

    Example:
        >>> [number(x) for x in (16.0, 0.01234, 1234567, 2.5e-9, None)]
        ['16', '0.0123', '1,234,567', '2.5e-9', '–']
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}".replace("-", "−")
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}".replace("-", "−", 1 if value < 0 else 0)


def percent(share: float | None) -> str:
    """Writes a share as per cent with two or three digits."""
    if share is None or not math.isfinite(share):
        return number(share)
    return f"{number(100 * share, 2 if abs(share) < 0.1 else 3)}{NARROW}%"


def size(count: float) -> str:
    """Writes bytes in the unit that leaves one to three digits before the point."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{0 if count >= 100 * factor else 1}f}{SPACE}{unit}"
    return f"{count:.0f}{SPACE}B"


def duration(seconds: float) -> str:
    """Writes seconds, or minutes or hours where they are many."""
    if seconds < 100:
        return f"{number(seconds)}{SPACE}s"
    if seconds < 6000:
        return f"{seconds / 60:.1f}{SPACE}min"
    return f"{seconds / 3600:.1f}{SPACE}h"


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1
) -> str:
    """Makes a table whose first cell of a row is its heading.

    Args:
        caption: What it shows.
        header: Headings of the columns.
        rows: Cells, as plain text.
        text_columns: The first so many columns are text; the rest are numbers, set to the right.
    """

    def cell(tag: str, column: int, text: str, extra: str = "") -> str:
        kind = "" if column < text_columns else ' class="n"'
        return f"<{tag}{extra}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(
            cell("td", i, text) if i else cell("th", i, text, ' scope="row"')
            for i, text in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table><caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def folded(summary: str, content: str) -> str:
    """Hides content, such as the table behind a chart, until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def section(name: str, title: str, lead: str, *content: str) -> str:
    """Makes a section that a link to #name leads to."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n'
        f'<p class="lead">{prose(lead)}</p>\n' + "".join(content) + "</section>\n"
    )


def missing(text: str) -> str:
    """Says how to get what a section would show."""
    return f'<p class="missing">{prose(text)}</p>\n'


def short_names(names: Sequence[str]) -> list[str]:
    """Leaves out what all names begin with, but for its last word.

    Example:
        >>> short_names(["model.layers.0", "model.layers.1"])
        ['layers.0', 'layers.1']
    """
    split = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(
        len(parts) > common + 1 and parts[common] == split[0][common] for parts in split
    ):
        common += 1
    kept = max(common - 1, 0)
    return [".".join(parts[kept:]) for parts in split]
