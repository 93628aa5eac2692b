"""The sections of the report about the steps: plan, widths, figures, quantization error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moq.report_axis import Axis, Point
from moq.report_charts import Cell, Line, Row, line_chart, row_chart, shade, thinned
from moq.report_data import Drops, Layer, RunRecord
from moq.report_html import (
    folded,
    missing,
    number,
    percent,
    section,
    table,
)

#: Cells of a heat map over the steps, at most.
CELLS = 6000
LOGGER = (
    'Give the optimizer a logger, `MoQOptimizer(…, loggers=CsvLogger("moq.csv"))`: '
    "`optimizer.save` keeps its file in the run. Or name one: `moq report RUN --scalars moq.csv`."
)


def plan_section(run: RunRecord, weights: dict[str, int]) -> str:
    """The plan before the training beside what happened.

    Args:
        run: The run.
        weights: Elements of each layer, for the mean width.
    """
    steps = Axis(0, run.total_steps, "optimizer step")
    happened, planned = "what happened", "plan without sensitivities"
    late = {layer.name: layer.arrival - layer.even[-1][0] for layer in run.layers}
    moved = len({layer.whole for layer in run.layers if late[layer.name]})
    layers = {layer.whole for layer in run.layers}
    ahead_of = {layer.whole for layer in run.layers if layer.arrival > run.step}
    lead = (
        f"{len(layers) - len(ahead_of)} of {len(layers)} layers have their target width after "
        f"{run.step:,} of {run.total_steps:,} steps. "
    )
    if run.probes:
        lead += (
            f"The measured sensitivities moved the arrival of {moved} of them, by "
            f"{_signed(min(late.values()))} to {_signed(max(late.values()))} steps from the plan "
            "with equal periods. "
            if moved
            else "The measured sensitivities moved none of the arrivals. "
        )
    lead += _agreement(run)

    counts = [weights.get(layer.name, 1) for layer in run.layers]
    mean = _mean_bits([layer.drops for layer in run.layers], counts, run.total_steps)
    even = _mean_bits([layer.even for layer in run.layers], counts, run.total_steps)
    past = [point for point in mean if point[0] <= run.step]
    lines = [Line(planned, [*even, (run.total_steps, even[-1][1])], "s1 dashed", True)]
    if not run.finished:
        ahead = [(run.step, past[-1][1]), *(p for p in mean if p[0] > run.step)]
        lines.append(Line("plan from here", [*ahead, (run.total_steps, mean[-1][1])], "s0 dashed",
                          True))  # fmt: skip
    lines.append(Line(happened, [*past, (run.step, past[-1][1])], "s0", True))
    logged = run.scalar("bits")
    if logged:
        every = max(1, math.ceil(len(logged) / 40))
        lines.append(Line("logged width", logged[::every], "s0 dots"))
    probes = [(probe.step, 0.0) for probe in run.probes]
    widths = [bits for line in lines for _, bits in line.points]
    content = line_chart(
        "Mean width of all quantized weights",
        steps,
        Axis.over([0, *widths], "bits"),
        lines,
        verticals=probes,
    )
    if probes:
        content += '<p class="note">Dotted vertical lines: probes of the sensitivity.</p>\n'
    content += row_chart(
        "Arrival of every layer at its target width",
        steps,
        [_arrival(layer, run.step) for layer in run.layers],
        legend=[
            ("could arrive, before any probe", "band"),
            (planned, "dots s1"),
            (happened if run.finished else f"{happened}, or is planned now", "dots s0"),
        ],
        verticals=probes,
        described="Arrival of every layer: the table below has the steps",
    )
    rows = [
        (
            layer.name,
            f"{layer.start_bits} → {layer.target_bits}",
            _range(layer.earliest[-1][0], layer.latest[-1][0], run.total_steps),
            _step(layer.even[-1][0], run.total_steps),
            _step(layer.arrival, run.total_steps) + ("" if layer.arrival <= run.step else " *"),
            _signed(late[layer.name]),
        )
        for layer in run.layers
    ]
    header = ("layer", "bits", "possible before probes", "plan without", "arrival", "difference")
    note = ". *: not reached" if ahead_of else ""
    content += folded(
        "Table: steps of arrival", table(f"Step of arrival at the target width{note}", header, rows)
    )
    return section("plan", "Plan against what happened", lead, content)


def bits_section(run: RunRecord) -> str:
    """Bits of every layer over the steps."""
    found = sorted({bits for layer in run.layers for _, bits in layer.drops}, reverse=True)
    rows = []
    for layer in run.layers:
        cells = []
        ends = [at for at, _ in layer.drops[1:]] + [run.total_steps]
        for (start, bits), end in zip(layer.drops, ends, strict=True):
            end = min(end, run.total_steps)
            for left, right, style in (
                (start, min(end, run.step), ""),
                (max(start, run.step), end, " future"),
            ):
                if left < right:
                    words = f"{layer.name}: {bits} bits, steps {left:,} to {right:,}"
                    text = str(bits) if right - left > run.total_steps / 20 and not style else ""
                    cells.append(Cell(left, right, f"w{bits}{style}", words, text))
        rows.append(Row(layer.label, cells))
    content = row_chart(
        "Width of every layer over time",
        Axis(0, run.total_steps, "optimizer step"),
        rows,
        legend=[(f"{bits} bits", f"w{bits}") for bits in found],
        verticals=[] if run.finished else [(run.step, 0.0)],
        described="Width of every layer over time: the table below has the steps",
    )
    table_rows = []
    for layer in run.layers:
        steps = {bits: at for at, bits in layer.drops}
        cells_of = (_step(steps[b], run.total_steps) if b in steps else "" for b in found)
        table_rows.append((layer.name, *cells_of))
    content += folded(
        "Table: first step at each width",
        table("First step at each width", ("layer", *map(str, found)), table_rows),
    )
    lead = "Every row is a layer, in the model's order; colours are widths."
    if not run.finished:
        lead += f" Pale: planned, from step {run.step:,} on."
    return section("bits", "Bits per layer", lead, content)


def figures_section(run: RunRecord) -> str:
    """Losses, accuracies and whatever else was logged."""
    lead = "What the training script logged: losses, accuracies."
    figures = run.figures()
    if not figures:
        text = (
            'No figures were logged: call `optimizer.log({"loss": loss})` after a step. ' + LOGGER
        )
        return section("figures", "Loss and accuracy", lead, missing(text))
    charts = ""
    for name, points in figures.items():
        lines = [Line(name, thinned(points), "s0 dots" if len(points) < 12 else "s0 faint")]
        if len(points) >= 12:
            span = max(3, len(points) // 15)
            lines.append(Line(f"mean of {span} values", thinned(_moving_mean(points, span)), "s0"))
        else:
            lines.append(Line("", points, "s0"))
        charts += line_chart(
            name,
            Axis(0, run.total_steps, "optimizer step"),
            Axis.over([y for _, y in points], name),
            lines,
            verticals=[(probe.step, 0.0) for probe in run.probes],
        )
    header = ("figure", "values", "first", "least", "greatest", "last")
    rows = [
        (name, number(len(points)), *(number(f([y for _, y in points]), 4) for f in
                                      (lambda v: v[0], min, max, lambda v: v[-1])))
        for name, points in figures.items()
    ]  # fmt: skip
    content = f'<div class="multiples">{charts}</div>\n' + table("Figures", header, rows)
    return section("figures", "Loss and accuracy", lead, content)


def error_section(run: RunRecord) -> str:
    """Quantization error and flips over the steps."""
    lead = (
        "Quantization error: distance of the simulated from the full-precision weights, over the "
        "norm of the latter. Flips: share of the weights whose integer changed in one step."
    )
    names = (("quantization_error", "quantization error"), ("flips", "flips"))
    if not any(run.scalar(name) for name, _ in names):
        return section("error", "Quantization error and flips", lead, missing(LOGGER))
    steps = Axis(0, run.total_steps, "optimizer step")
    charts = maps = ""
    for name, words in names:
        points = run.scalar(name)
        if not points:
            continue
        percents = thinned([(x, 100 * y) for x, y in points])
        charts += line_chart(
            f"{words.capitalize()} of the whole model",
            steps,
            Axis.over([y for _, y in percents], "%"),
            [Line(words, percents)],
            verticals=[(probe.step, 0.0) for probe in run.probes],
        )
        maps += _heat_over_steps(run, name, words)
    content = f'<div class="multiples">{charts}</div>\n{maps}'
    return section("error", "Quantization error and flips", lead, content)


def _agreement(run: RunRecord) -> str:
    """Whether the widths that were logged are those of the plan."""
    checked = differing = 0
    for layer in run.layers:
        for step, bits in run.scalar("bits", layer.name):
            checked += 1
            differing += bits != layer.bits_at(int(step))
    if not checked:
        return ""
    if not differing:
        return f"All {checked:,} widths that were logged meanwhile are those of the plan."
    return (
        f"{differing:,} of {checked:,} widths that were logged are not those of the plan: the file "
        "is from another training, or the plan was changed later."
    )


def _mean_bits(plans: Sequence[Drops], weights: Sequence[int], total_steps: int) -> list[Point]:
    """Mean width after each drop within the training, weighted by elements."""
    steps = sorted({at for drops in plans for at, _ in drops if at <= total_steps})
    total = sum(weights) or 1
    return [
        (
            float(step),
            sum(
                min(bits for at, bits in drops if at <= step) * weight
                for drops, weight in zip(plans, weights, strict=True)
            )
            / total,
        )
        for step in steps
    ]


def _arrival(layer: Layer, step: int) -> Row:
    early, late, even = layer.earliest[-1][0], layer.latest[-1][0], layer.even[-1][0]
    band = Cell(early, late, "band", f"{layer.name}: step {early:,} to {late:,}, before any probe")
    word = "arrived" if layer.arrival <= step else "arrives"
    marks = [
        (even, "s1 under", f"{layer.name}: step {even:,} without sensitivities"),
        (layer.arrival, "s0", f"{layer.name}: {word} at step {layer.arrival:,}"),
    ]
    return Row(layer.label, [band] if early < late else [], marks)


def _heat_over_steps(run: RunRecord, name: str, words: str) -> str:
    """A heat map of one scalar: layers over steps."""
    series = {layer.name: run.scalar(name, layer.name) for layer in run.layers}
    largest = max((y for points in series.values() for _, y in points), default=0.0)
    if not largest > 0:
        return ""
    columns = min(max(CELLS // len(run.layers), 12), 60)
    rows = []
    for layer in run.layers:
        points = thinned(series[layer.name], columns)
        starts = [0.0, *(x for x, _ in points[:-1])]
        cells = [
            Cell(
                start,
                end,
                shade(value / largest),
                f"{layer.name}, step {end:,.0f}: {words} {percent(value)}",
            )
            for start, (end, value) in zip(starts, points, strict=False)
            if math.isfinite(value)
        ]
        rows.append(Row(layer.label, cells))
    chart = row_chart(
        f"{words.capitalize()} of every layer",
        Axis(0, run.total_steps, "optimizer step"),
        rows,
        legend=[("0", "h0"), (percent(largest / 2), "h10"), (percent(largest), "h19")],
        described=f"{words.capitalize()} of every layer over the steps: the table has the last",
    )
    last = [(n, percent(points[-1][1])) for n, points in series.items() if points]
    return chart + folded(
        f"Table: last {words} of every layer",
        table(f"{words.capitalize()} of every layer, last logged", ("layer", words), last),
    )


def _moving_mean(points: Sequence[Point], span: int) -> list[Point]:
    """Means of `span` neighbours, at the middle one."""
    return [
        (points[i + span // 2][0], math.fsum(y for _, y in points[i : i + span]) / span)
        for i in range(len(points) - span + 1)
    ]


def _step(step: int, total: int) -> str:
    return f"{step:,}" if step <= total else "after the end"


def _signed(steps: int) -> str:
    return f"{steps:+,}".replace("-", "−") if steps else "0"


def _range(low: int, high: int, total: int) -> str:
    return _step(low, total) if low == high else f"{_step(low, total)} – {_step(high, total)}"
