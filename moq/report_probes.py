"""The sections of the report about probes: sensitivities, spectral densities, and their cost."""

from __future__ import annotations

import math

from moq.report_axis import Axis
from moq.report_charts import Cell, Line, Row, line_chart, row_chart, shade, thinned
from moq.report_data import Probe, RunRecord, in_order
from moq.report_html import duration, folded, missing, number, percent, section, table

SPECTRA = 12
CURVATURE = {
    "trace": "trace of its block of the {matrix}",
    "eigenvalue": "top eigenvalue of its block of the {matrix}",
    "both": "trace of its block of the {matrix}; its top eigenvalue was measured too",
}
#: What stands for the Hessian, by the probe's form.
MATRIX = {"gauss_newton": "Gauss-Newton matrix", "fisher": "empirical Fisher matrix"}
#: Densities below this share of the largest are drawn as that.
DENSITY_FLOOR = 1e-5


def sensitivity_section(run: RunRecord) -> str:
    """Sensitivity of every block at every probe, as a heat map."""
    title = "Sensitivity"
    if not run.probes:
        return section(
            "sensitivity",
            title,
            "How much the loss curves in the weights of each layer.",
            missing(
                "Nothing was measured in this run: call `optimizer.probe(loss_fn, batches)` before "
                "the training, and again when you like."
            ),
        )
    measured = {name for probe in run.probes for name in probe.values}
    labels = {layer.name: layer.label for layer in run.layers}
    names = in_order(sorted(measured), run.layers)
    rows = []
    for name in names:
        cells = []
        for i, probe in enumerate(run.probes):
            if name in probe.values:
                words = (
                    f"{name}, step {probe.step:,}: {number(probe.normalised[name])} of the "
                    f"largest; {probe.measure} {_with_error(probe, name)}"
                )
                value = probe.normalised[name]
                style = shade(value) + (" strong" if value > 0.6 else "")
                cells.append(Cell(i, i + 1, style, words, number(value, 2)))
        rows.append(Row(labels.get(name, name), cells))
    columns = [(i + 0.5, f"step {p.step:,}") for i, p in enumerate(run.probes)]
    content = row_chart(
        "Sensitivity of every layer, over the largest of the probe",
        Axis(0, len(run.probes), "probe"),
        rows,
        legend=[("0", "h0"), ("0.5", "h10"), ("1", "h19")],
        ticks=columns[:: max(1, len(columns) // 8)],
        described="Sensitivity of every layer: the table below has the numbers",
        most_width=220 + 110 * len(run.probes),
    )
    header = ["layer"]
    for probe in run.probes:
        header += [f"step {probe.step:,}: {probe.measure}", "of the largest"]
    table_rows = []
    for name in names:
        row = [name]
        for probe in run.probes:
            known = name in probe.values
            row += [_with_error(probe, name), number(probe.normalised[name], 2)] if known else [
                "–", "–"]  # fmt: skip
        table_rows.append(row)
    content += folded("Table: sensitivities", table("Sensitivity by probe", header, table_rows))
    last = run.probes[-1]
    top = sorted(last.normalised, key=lambda name: -last.normalised[name])[:3]
    curvature = CURVATURE[last.measure].format(matrix=MATRIX.get(last.form or "", "Hessian"))
    lead = (
        f"How much the loss curves in the weights of each layer ({curvature}); the largest of a "
        "probe counts as 1. Sensitive layers stay longer at each width. Most sensitive at the last "
        f"probe: {', '.join(top)}."
    )
    noise = [name for name in names if _is_noise(last, name)]
    if noise:
        lead += (
            f" No larger than its standard error, and so nothing but noise: {', '.join(noise)}; "
            "more products or batches make it clearer."
        )
    return section("sensitivity", title, lead, content)


def spectrum_section(run: RunRecord) -> str:
    """Spectral densities of chosen blocks."""
    title = "Spectral density"
    lead = "How the eigenvalues of a layer's block of the Hessian are spread"
    if not run.spectra:
        text = (
            "This run has none. Measure some layers and add them to the run: "
            f"`moq.spectral_density(loss_fn, batches, optimizer, blocks=[…], "
            f'run="{run.directory}")`.'
        )
        return section("spectrum", title, lead + ".", missing(text))
    place = {name: i for i, name in enumerate(in_order([s.block for s in run.spectra], run.layers))}
    spectra = sorted(run.spectra, key=lambda s: (place[s.block], s.step or 0))
    charts = ""
    for spectrum in spectra[:SPECTRA]:
        floor = max(max(spectrum.density) * DENSITY_FLOOR, 1e-300)
        points = [
            (x, max(y, floor)) for x, y in zip(spectrum.values, spectrum.density, strict=True)
        ]
        when = "" if spectrum.step is None else f", step {spectrum.step:,}"
        charts += line_chart(
            f"{spectrum.block}{when}",
            Axis.over([x for x, _ in points], "eigenvalue", tight=True, zero=False),
            Axis.over([y for _, y in points], "density", log=True),
            [Line("density", thinned(points))],
        )
    header = ("layer", "step", "eigenvalues", "smallest", "largest", "trace", "products")
    rows = [
        (
            s.block,
            number(s.step),
            number(s.num_weights),
            number(s.smallest),
            number(s.largest),
            f"{number(s.trace)} ± {number(s.trace_error, 2)}",
            number(s.products),
        )
        for s in spectra
    ]
    content = f'<div class="multiples">{charts}</div>\n'
    if spectra[SPECTRA:]:
        content += f'<p class="note">{len(spectra) - SPECTRA} more are in the table.</p>\n'
    content += table("Spectra", header, rows)
    lead += (
        ": the share of all eigenvalues per unit, blurred, on a logarithmic scale. Most lie near "
        "0, few far out."
    )
    return section("spectrum", title, lead, content)


def cost_section(run: RunRecord) -> str:
    """What the probes cost."""
    lead = "Products with the matrix and wall time of the probes"
    if not run.probes:
        return section("cost", "Cost of the probes", lead + ".", missing("There was no probe."))
    training, per_step, last = run.training_seconds, run.seconds_per_step, run.probes[-1]
    spent = [probe.seconds for probe in run.probes if probe.seconds is not None]
    if training and spent:
        take = "were thought to take" if per_step is None else f"of {duration(per_step)} take"
        lead += (
            f": {duration(math.fsum(spent))}, {percent(math.fsum(spent) / training)} of the "
            f"{duration(training)} that all {run.total_steps:,} steps {take}"
        )
    if last.max_cost is not None:
        lead += f"; at most {percent(last.max_cost)} of the training was allowed"
        if last.training_seconds is not None and per_step is not None:
            lead += (
                f", which at the last probe was thought to take {duration(last.training_seconds)}"
            )
    header = ("probe at step", "measure", "products", "time", "of training", "tolerance met")
    rows = [
        (
            number(probe.step),
            probe.measure + (f" ({probe.form.replace('_', ' ')})" if probe.form else ""),
            number(probe.products),
            "–" if probe.seconds is None else duration(probe.seconds),
            percent(probe.seconds / training) if training and probe.seconds is not None else "–",
            {True: "yes", False: "no", None: "–"}[probe.converged],
        )
        for probe in run.probes
    ]
    content = table("Probes", header, rows, text_columns=2)
    if training is None:
        content += missing("How long a step took is not in this run: it was saved after no step.")
    return section("cost", "Cost of the probes", lead + ".", content)


def _with_error(probe: Probe, name: str) -> str:
    error = f" ± {number(probe.errors[name], 2)}" if name in probe.errors else ""
    return number(probe.values[name]) + error + (" (noise)" if _is_noise(probe, name) else "")


def _is_noise(probe: Probe, name: str) -> bool:
    """Whether a value is no larger than its standard error."""
    error = probe.errors.get(name, 0.0)
    return error > 0.0 and abs(probe.values.get(name, math.inf)) <= error
