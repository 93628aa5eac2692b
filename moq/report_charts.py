"""Charts of the report: SVG that stretches to any width, with its labels as ordinary text.

What is drawn lies in a box of 1000 x 1000 units that is stretched to the width of the page; lines
keep their thickness, and labels, which are HTML beside it, their size. Colours are classes of
report.css, so that they follow the reader's light or dark mode. Pointing at a place shows the
numbers behind it (title elements).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from moq.report_axis import BOX, Axis, Point
from moq.report_html import number

#: Places of a chart that show their numbers, and points of a line, at most.
PLACES = 120
POINTS = 600
LEVELS = 20  # shades of a heat map, classes h0 to h19
LABEL_HEIGHT = 15  # pixels


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: In the legend; empty for one that only joins the dots of another.
        points: (x, y), by rising x.
        style: Class: s0 to s3, with ``dashed``, ``faint`` or ``dots`` (points without a line).
        steps: Whether a value holds until the next x.
    """

    name: str
    points: Sequence[Point]
    style: str = "s0"
    steps: bool = False


@dataclass(frozen=True)
class Cell:
    """A coloured stretch of a row.

    Attributes:
        start, end: From and to where, on the x axis.
        style: Class: w2 to w16 for a width, h0 to h19 for a shade; ``future`` for what is planned.
        title: What pointing at it shows.
        text: Written upon it, where rows are high enough.
    """

    start: float
    end: float
    style: str
    title: str
    text: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a chart of layers.

    Attributes:
        label: Name of the layer.
        cells: Its stretches.
        marks: (x, style, title) of dots upon them.
    """

    label: str
    cells: Sequence[Cell]
    marks: Sequence[tuple[float, str, str]] = field(default_factory=list)


def line_chart(
    title: str, x: Axis, y: Axis, lines: Sequence[Line], *, verticals: Sequence[Point] = ()
) -> str:
    """Draws lines over a common axis.

    Args:
        title: Above the chart, and what a screen reader says.
        x: The axis below.
        y: The axis at the left.
        lines: The lines; those drawn last lie on top.
        verticals: (x, 0) of dotted vertical lines.
    """
    ticks_x, ticks_y = x.ticks(6), y.ticks(5)
    drawn = [f'<path class="grid" d="M0 {BOX - y.place(v):.1f}H{BOX}"/>' for v in ticks_y] + [
        f'<path class="mark" d="M{x.place(at):.1f} 0V{BOX}"/>' for at, _ in verticals
    ]
    for line in lines:
        drawn += _paths(x, y, line)
    drawn += _places(x, lines)
    return _figure(
        title,
        "".join(drawn),
        legend=_legend_of(lines),
        x=x,
        ticks_x=ticks_x,
        y=[(BOX - y.place(v), words) for v, words in zip(ticks_y, y.words(ticks_y), strict=True)],
        y_title=y.title,
        described=_summary(title, x, lines),
    )


def row_chart(
    title: str,
    x: Axis,
    rows: Sequence[Row],
    *,
    legend: Sequence[tuple[str, str]],
    ticks: Sequence[tuple[float, str]] | None = None,
    verticals: Sequence[Point] = (),
    described: str,
    most_width: int | None = None,
) -> str:
    """Draws one row for each layer, in the given order from the top.

    Args:
        title: Above the chart.
        x: The axis.
        rows: The rows; some hundred get thinner, and not each its label.
        legend: (words, class).
        ticks: (x, label) instead of round values.
        verticals: (x, 0) of dotted vertical lines.
        described: What a screen reader says.
        most_width: Pixels, for charts of few columns.
    """
    height = next(h for most, h in ((48, 18), (96, 12), (200, 7), (400, 4), (10**9, 3)) if
                  len(rows) <= most)  # fmt: skip
    unit = BOX / len(rows)
    gap = unit * 0.06 if height >= 12 else 0.0  # thin ones would flicker
    drawn, written = [], ""
    for index, row in enumerate(rows):
        top = index * unit
        for cell in row.cells:
            left = x.place(cell.start)
            drawn.append(
                f'<rect class="{cell.style}" x="{left:.1f}" y="{top + gap:.2f}" '
                f'width="{max(x.place(cell.end) - left, 1):.1f}" height="{unit - 2 * gap:.2f}">'
                f"<title>{escape(cell.title)}</title></rect>"
            )
            if cell.text and height > LABEL_HEIGHT:
                middle = x.place((cell.start + cell.end) / 2)
                written += (
                    f'<span class="{cell.style}" style="left:{middle / BOX:.2%};'
                    f'top:{(top + unit / 2) / BOX:.3%}">{escape(cell.text)}</span>'
                )
        for at, style, words in row.marks:
            dot = min(height - 2, 11 if "under" in style.split() else 7)
            drawn.append(
                f'<path class="dot {style}" style="--size:{dot}px" '
                f'd="M{x.place(at):.1f} {top + unit / 2:.1f}h.01"><title>{escape(words)}</title>'
                "</path>"
            )
    drawn += [f'<path class="mark" d="M{x.place(at):.1f} 0V{BOX}"/>' for at, _ in verticals]
    every = max(1, math.ceil(LABEL_HEIGHT / height))
    labels = [((i + 0.5) * unit, rows[i].label) for i in range(0, len(rows), every)]
    return _figure(
        title,
        "".join(drawn),
        legend=legend,
        x=x,
        ticks_x=x.ticks(6),
        named_ticks=ticks,
        y=labels,
        y_title="",
        described=described,
        height=height * len(rows),
        most_width=most_width,
        written=written,
        high=height >= 12,
    )


def bar_chart(
    title: str,
    rows: Sequence[tuple[str, str, Sequence[tuple[float, str, str]]]],
    legend: Sequence[tuple[str, str]],
    described: str,
) -> str:
    """Draws stacked horizontal bars.

    Args:
        title: Above the chart.
        rows: (label, what stands at the right, [(length, class, words)]).
        legend: (words, class).
        described: What a screen reader says.
    """
    longest = max(sum(length for length, _, _ in parts) for _, _, parts in rows) or 1.0
    bars = ""
    for label, value, parts in rows:
        pieces, left = "", 0.0
        for length, style, words in parts:
            share = BOX * length / longest
            pieces += (
                f'<rect class="{style}" x="{left:.1f}" y="0" width="{share:.1f}" height="{BOX}">'
                f"<title>{escape(words)}</title></rect>"
            )
            left += share
        bars += (
            f'<div class="bar"><span>{escape(label)}</span>{_svg(pieces)}'
            f"<span>{escape(value)}</span></div>\n"
        )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{_legend(legend)}</figcaption>\n'
        f'<div role="img" aria-label="{escape(described)}">\n{bars}</div></figure>\n'
    )


def shade(share: float) -> str:
    """Returns the class of a value in [0, 1]: h0 the least, h19 the most."""
    return f"h{min(int(max(share, 0.0) * LEVELS), LEVELS - 1)}"


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Averages neighbours until at most `most` points are left; each stands at its last x."""
    if len(points) <= most:
        return list(points)
    every = math.ceil(len(points) / most)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [(g[-1][0], math.fsum(y for _, y in g) / len(g)) for g in groups]


def _paths(x: Axis, y: Axis, line: Line) -> list[str]:
    """The path of a line, broken where a value is not finite; or a dot for each point."""
    if "dots" in line.style.split():
        return [
            f'<path class="dot {line.style}" d="M{x.place(a):.1f} {BOX - y.place(b):.1f}h.01"/>'
            for a, b in line.points
            if math.isfinite(b)
        ]
    words, pen = [], "M"
    for a, b in line.points:
        if not math.isfinite(b):
            pen = "M"
            continue
        left, top = x.place(a), BOX - y.place(b)
        words.append(f"H{left:.1f}V{top:.1f}" if line.steps and pen == "L" else
                     f"{pen}{left:.1f} {top:.1f}")  # fmt: skip
        pen = "L"
    single = "h.01" if len(words) == 1 else ""
    return [f'<path class="line {line.style}" d="{"".join(words)}{single}"/>'] if words else []


def _places(x: Axis, lines: Sequence[Line]) -> list[str]:
    """Invisible stripes around the places of points, which show the numbers there."""
    at = sorted({a for line in lines for a, _ in line.points})
    at = at[:: max(1, math.ceil(len(at) / PLACES))]
    middles = [(x.place(a) + x.place(b)) / 2 for a, b in zip(at, at[1:], strict=False)]
    stripes = []
    for value, left, right in zip(at, [0.0, *middles], [*middles, float(BOX)], strict=True):
        words = [f"{x.title} {number(value, 6)}"]
        for line in lines:
            before = [b for a, b in line.points if (a <= value if line.steps else a == value)]
            if before and line.name:
                words.append(f"{line.name}: {number(before[-1], 4)}")
        stripes.append(
            f'<rect class="place" x="{left:.1f}" y="0" width="{max(right - left, 0.1):.1f}" '
            f'height="{BOX}"><title>{escape(chr(10).join(words))}</title></rect>'
        )
    return stripes


def _legend_of(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """What names the lines; nothing where there is but one."""
    named = [(line.name, line.style) for line in lines if line.name]
    return named if named[1:] else []


def _summary(title: str, x: Axis, lines: Sequence[Line]) -> str:
    """Says where each line begins and ends."""
    ends = [
        f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}"
        for line in lines
        if line.points and line.name
    ]
    return f"{title}, over {x.title}: {'; '.join(ends)}"


def _crowd(labels: Sequence[str]) -> str:
    """Class of labels that have no room beside each other on a phone: some of them hide there."""
    characters = sum(map(len, labels))
    return "" if characters <= 26 else " some" if characters <= 42 else " many"


def _svg(drawn: str) -> str:
    return f'<svg viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none">{drawn}</svg>'


def _legend(legend: Sequence[tuple[str, str]]) -> str:
    if not legend:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 20 10"><path class="key {style}" d="M1 5H19"/></svg>'
        f"{escape(words)}</li>"
        for words, style in legend
    )
    return f'<ul class="legend">{items}</ul>'


def _figure(
    title: str,
    drawn: str,
    *,
    legend: Sequence[tuple[str, str]],
    x: Axis,
    ticks_x: Sequence[float],
    y: Sequence[tuple[float, str]],
    y_title: str,
    described: str,
    named_ticks: Sequence[tuple[float, str]] | None = None,
    height: int | None = None,
    most_width: int | None = None,
    written: str = "",
    high: bool = False,
) -> str:
    """Puts the labels of both axes around what was drawn."""
    below = named_ticks or list(zip(ticks_x, x.words(ticks_x), strict=True))
    labels_x = "".join(
        f'<span style="left:{x.place(value) / BOX:.2%}">{escape(words)}</span>'
        for value, words in below
    )
    labels_y = "".join(
        f'<span style="top:{place / BOX:.3%}" title="{escape(words)}">{escape(words)}</span>'
        for place, words in y
    )
    widest = max((len(words) for _, words in y), default=1)
    style = f"--labels:{min(widest, 24)}ch"
    style += f";--height:{height}px" if height else ""
    narrow = f' style="max-width:{most_width}px"' if most_width else ""
    written = f'<div class="in">{written}</div>' if written else ""
    kind = "plot rows" if height else "plot"
    kind += " high" if high else ""
    unit = f'<span class="unit">{escape(y_title)}</span>' if y_title else ""
    return (
        f'<figure class="chart"{narrow}><figcaption>{escape(title)}{_legend(legend)}'
        f"</figcaption>\n{unit}"
        f'<div class="{kind}" style="{style}" role="img" aria-label="{escape(described)}">\n'
        f'{_svg(drawn)}{written}<div class="y">{labels_y}</div>\n'
        f'<div class="x{_crowd([words for _, words in below])}">{labels_x}</div></div>\n'
        f'<p class="axis">{escape(x.title)}</p></figure>\n'
    )
