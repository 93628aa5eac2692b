"""The report as one page: what stands at the top, the sections about weights, and all the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from moq.report_axis import Axis
from moq.report_charts import Cell, Line, Row, bar_chart, line_chart, row_chart
from moq.report_data import RunRecord
from moq.report_html import (
    duration,
    folded,
    missing,
    number,
    percent,
    prose,
    section,
    size,
    table,
)
from moq.report_probes import cost_section, sensitivity_section, spectrum_section
from moq.report_sections import bits_section, error_section, figures_section, plan_section
from moq.report_weights import RunWeights
from moq.target_bits import TargetBits

#: Points of the front that the table and the map of widths show.
SHOWN = 12
#: Nothing is fetched, run or sent, whatever the names in a run may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Front = tuple[TargetBits, tuple[float, float] | None]
"""The front, and where the run's own targets lie, as (mean bits, loss)."""


def page(run: RunRecord, weights: RunWeights, front: Front | str, written_by: str) -> str:
    """Renders the report.

    Args:
        run: What the run tells.
        weights: Its sizes.
        front: The Pareto front and where the run's own targets lie, or why there is none.
        written_by: At the foot of the page.
    """
    counts = {name: layer.count for name, layer in weights.layers.items()}
    sections = [
        plan_section(run, counts),
        bits_section(run),
        sensitivity_section(run),
        spectrum_section(run),
        front_section(run, front),
        size_section(weights),
        figures_section(run),
        error_section(run),
        cost_section(run),
        layers_section(run, weights),
    ]
    name = run.directory.resolve().name
    links = "".join(
        f'<a href="#{anchor}">{escape(title)}</a>'
        for anchor, title in (
            ("plan", "Plan"),
            ("bits", "Bits"),
            ("sensitivity", "Sensitivity"),
            ("spectrum", "Spectrum"),
            ("front", "Front"),
            ("size", "Size"),
            ("figures", "Loss"),
            ("error", "Error"),
            ("cost", "Cost"),
            ("layers", "Layers"),
        )
    )
    bits = {bits for layer in run.layers for _, bits in layer.drops}
    if not isinstance(front, str):
        bits |= {bits for block in front[0].blocks for bits in block.widths}
    style = files("moq").joinpath("report.css").read_text(encoding="utf-8") + _width_colours(bits)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>moq report: {escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(name)}</h1>\n"
        f'<p class="lead">{escape(_headline(run, weights))}</p>\n</header>\n'
        f"{_cards(run, weights)}"
        f'<nav aria-label="Sections">{links}</nav>\n<main>\n{"".join(sections)}</main>\n'
        f"<footer><p>{prose(written_by)}</p></footer>\n</body>\n</html>\n"
    )


def front_section(run: RunRecord, front: Front | str) -> str:
    """The Pareto front of target widths."""
    title = "Pareto front of target bits"
    lead = (
        "The increase of the loss that rounding is expected to make (over all layers, half the "
        "mean eigenvalue times the squared rounding error) at each mean width: no choice of target "
        "widths beats a point of the front in both."
    )
    if isinstance(front, str):
        return section("front", title, lead, missing(front))
    choice, own = front
    shown = _shown(choice)
    points = choice.front
    lines = [Line("front", points if len(points) < 400 else [points[i] for i in
                  _spread(len(points), 400)], "s0", True)]  # fmt: skip
    if len(points) <= 60:
        lines.append(Line("choices", points, "s0 dots"))
    if own is not None:
        lines.append(Line("targets of this run", [own], "s1 dots large"))
        lead += (
            f" The targets of this run: {number(own[0])} bits in the mean, loss {number(own[1])}."
        )
    if choice.warning is not None:
        lead += f" {choice.warning[0].upper()}{choice.warning[1:]}."
    costs, losses = [c for c, _ in points], [loss for _, loss in points]
    every = [loss for line in lines for _, loss in line.points]
    log = sum(1 for loss in every if loss > 0) > 1
    if log:
        least = min(loss for loss in every if loss > 0)
        lines = [
            Line(n.name, [(x, max(y, least / 10)) for x, y in n.points], n.style, n.steps)
            for n in lines
        ]
        every = [y for line in lines for _, y in line.points]
    content = line_chart(
        f"{len(points):,} choices that no other beats",
        Axis.over(costs, "mean bits of a quantized weight", zero=False),
        Axis.over(every, "expected loss", log=log),
        lines,
    )
    labels = {layer.name: layer.label for layer in run.layers}
    widths = {point: choice.front_bits(point) for point in shown}
    rows = [
        Row(
            labels.get(block.name, block.name),
            [
                Cell(
                    i,
                    i + 1,
                    f"w{widths[point][number_]}",
                    f"{block.name}: {widths[point][number_]} bits at {number(costs[point])} in "
                    "the mean",
                    str(widths[point][number_]),
                )
                for i, point in enumerate(shown)
            ],
        )
        for number_, block in enumerate(choice.blocks)
    ]
    offered = sorted({bits for block in choice.blocks for bits in block.widths}, reverse=True)
    content += row_chart(
        "Which layer has which width along the front",
        Axis(0, len(shown), "mean bits of a quantized weight"),
        rows,
        legend=[(f"{bits} bits", f"w{bits}") for bits in offered],
        ticks=[(i + 0.5, number(costs[point])) for i, point in enumerate(shown)],
        described="Widths of every layer along the front",
        most_width=240 + 64 * len(shown),
    )
    table_rows = []
    for point in shown:
        counts = sorted(Counter(widths[point]).items())
        words = ", ".join(f"{count} at {bits}" for bits, count in counts)
        table_rows.append((number(costs[point]), number(losses[point]), words))
    content += folded(
        "Table: points of the front",
        table("Points of the front", ("mean bits", "loss", "layers at each width"), table_rows),
    )
    content += (
        '<p class="note">'
        + prose(
            "To choose under a budget: `optimizer.choose_target_bits(mean_bits=6)`, or for a new "
            f"training `moq schedule --run {run.directory} --budget mean_bits=6`."
        )
        + "</p>\n"
    )
    return section("front", title, lead, content)


def size_section(weights: RunWeights) -> str:
    """Bytes by width, and what other formats would take."""
    other, own = weights.other_bytes, weights.quantized_bytes
    exported = own + other
    single = 4 * weights.parameters
    lead = (
        f"Exported, the tensors of the model take {size(exported)}, {percent(exported / single)} "
        f"of {size(single)} in FP32. Above 8 bits weights are stored as floats, 5 to 7 bits in 8."
    )
    by_width = [
        (total.bytes, f"w{bits}", f"{bits} bits: {size(total.bytes)}")
        for bits, total in sorted(weights.widths.items(), reverse=True)
    ]
    rest = (other, "rest", f"not quantized: {size(other)}")
    rows: list[tuple[str, str, Sequence[tuple[float, str, str]]]] = [
        ("all in FP32", size(single), [(single, "plain", f"all in FP32: {size(single)}")]),
        ("all in FP16", size(single // 2), [(single // 2, "plain", "all in FP16")]),
        (
            "weights in INT8",
            size(weights.int8_bytes + other),
            [(weights.int8_bytes, "plain", f"in INT8: {size(weights.int8_bytes)}"), rest],
        ),
        ("this run, exported", size(exported), [*by_width, rest]),
    ]
    legend = [(f"{bits} bits", f"w{bits}") for bits in sorted(weights.widths, reverse=True)]
    content = bar_chart(
        "Size of all tensors",
        rows,
        [*legend, ("not quantized", "rest")],
        "; ".join(f"{label}: {value}" for label, value, _ in rows),
    )
    table_rows = [
        (f"{bits} bits", number(t.matrices), number(t.elements), size(t.bytes),
         percent(t.bytes / exported if exported else None))
        for bits, t in sorted(weights.widths.items(), reverse=True)
    ]  # fmt: skip
    rest_count = weights.parameters - sum(t.elements for t in weights.widths.values())
    table_rows.append(
        ("not quantized", "–", number(rest_count), size(other), percent(other / exported))
    )
    header = ("stored", "matrices", "weights", "bytes", "of the export")
    content += table("Bytes by width", header, table_rows)
    return section("size", "Size", lead, content)


def layers_section(run: RunRecord, weights: RunWeights) -> str:
    """Everything about every layer, as a table."""
    last = run.probes[-1].normalised if run.probes else {}
    rows = []
    for layer in run.layers:
        own = weights.layers.get(layer.name)
        rows.append(
            (
                layer.name,
                ", ".join(own.grids) if own else "",
                number(own.count) if own else "–",
                str(layer.bits_at(run.step)),
                str(layer.target_bits) + (" *" if layer.name in run.chosen else ""),
                number(last[layer.name], 2) if layer.name in last else "–",
                percent(own.error) if own else "–",
                size(own.bytes) if own else "–",
            )
        )
    header = ("layer", "grid", "weights", "bits", "target", "sensitivity", "error", "bytes")
    lead = (
        "What the run holds at its last step: error is the quantization error, computed from the "
        "saved full-precision weights."
    )
    if run.chosen:
        lead += " *: target chosen under a budget."
    content = table("Layers", header, rows, text_columns=2)
    return section("layers", "Every layer", lead, content)


def _headline(run: RunRecord, weights: RunWeights) -> str:
    state = (
        f"{run.total_steps:,} steps, finished"
        if run.finished
        else f"unfinished, saved after {run.step:,} of {run.total_steps:,} steps: what lies ahead "
        "is plan"
    )
    matrices = sum(total.matrices for total in weights.widths.values())
    layers = len({layer.whole for layer in run.layers})
    return f"{run.model}, {matrices:,} quantized weights in {layers} layers; {state}."


def _cards(run: RunRecord, weights: RunWeights) -> str:
    """The handful of numbers that somebody looks for first."""
    elements = sum(total.elements for total in weights.widths.values()) or 1
    mean = sum(bits * total.elements for bits, total in weights.widths.items()) / elements
    counts = {name: layer.count for name, layer in weights.layers.items()}
    start = sum(layer.start_bits * counts.get(layer.name, 0) for layer in run.layers) / elements
    exported = weights.quantized_bytes + weights.other_bytes
    cards = [
        ("mean width", f"{number(start)} → {number(mean)} bits"),
        ("exported size", f"{size(exported)}, FP32 {size(4 * weights.parameters)}"),
        ("quantization error", percent(weights.error)),
    ]
    for name, points in run.figures().items():
        values = [y for _, y in points]
        cards.append((name, f"{number(values[0])} → {number(values[-1])}"))
    spent = math.fsum(probe.seconds or 0.0 for probe in run.probes)
    if run.probes and run.training_seconds:
        share = percent(spent / run.training_seconds)
        cards.append(("probes", f"{duration(spent)}, {share} of training"))
    elif run.probes:
        cards.append(("probes", duration(spent)))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in cards[:8]
    )
    return f'<dl class="cards">\n{items}</dl>\n'


def _shown(choice: TargetBits) -> list[int]:
    """Numbers of the points of the front that are shown: evenly spread, the ends included."""
    return _spread(len(choice.front), SHOWN)


def _spread(count: int, most: int) -> list[int]:
    last = count - 1
    return sorted({round(last * i / (most - 1)) for i in range(most)})


def _width_colours(bits: set[int]) -> str:
    """Gives each width that occurs its colour, between three that differ in hue and lightness."""
    ordered = sorted(bits)
    rules = ""
    for place, width in enumerate(ordered):
        share = 200 * place / max(len(ordered) - 1, 1)
        low, high = ("few", "middle") if share < 100 else ("middle", "many")
        part = share if share < 100 else share - 100
        mixed = f"color-mix(in oklab, var(--{high}) {part:.0f}%, var(--{low}))"
        text = "on-few" if share <= 100 else "text"
        rules += f".w{width} {{ --c: {mixed}; }} .in .w{width} {{ color: var(--{text}); }}\n"
    return rules
