"""The tables of accuracy.py: results as Markdown, and their place in a document."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
BEGIN, END = "<!-- accuracy.py: begin -->", "<!-- accuracy.py: end -->"
FULL_BITS = 32

#: In the order of a table's rows.
METHODS = {
    "fp32": "FP32",
    "ptq": "rounded after training",
    "ptq_mse": "rounded, scales of least squared error",
    "ptq_error": "rounded, widths by rounding error",
    "ptq_trace": "rounded, widths by trace and rounding error",
    "ptq_budget": "rounded, widths by mean eigenvalue and rounding error",
    "qat": "QAT, this width from the first step",
    "time": "MoQ by time",
    "trace": "MoQ + trace",
    "eigenvalue": "MoQ + eigenvalue",
    "shuffled": "MoQ + trace, of another layer drawn at random",
    "budget_error": "MoQ, widths by rounding error",
    "budget_trace": "MoQ, widths by trace and rounding error",
    "budget": "MoQ, widths by mean eigenvalue and rounding error",
}
MIXED = {"ptq_error", "ptq_trace", "ptq_budget", "budget_error", "budget_trace", "budget"}
#: What a method is compared with, seed by seed.
BASELINES = {
    "qat": "time",
    "trace": "time",
    "eigenvalue": "time",
    "shuffled": "trace",
    "budget": "budget_error",
    "budget_trace": "budget_error",
    "ptq_budget": "ptq_error",
    "ptq_trace": "ptq_error",
}
KINDS = {"layers": "layers", "fused": "fused blocks"}
#: The predictor that is an increase of the loss: half the mean eigenvalue times the squared error.
EXPECTED = "mean eigenvalue * squared error"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def difference(own: Mapping[int, float], base: Mapping[int, float], digits: int) -> str:
    """Mean difference over common seeds, and its standard error."""
    both = [own[seed] - base[seed] for seed in own.keys() & base.keys()]
    if not both:
        return ""
    text = f"{statistics.fmean(both):+.{digits}f}"
    if len(both) == 1:
        return text
    return f"{text} ± {statistics.stdev(both) / math.sqrt(len(both)):.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scores(results: Sequence[Result]) -> str:
    """Score of every method, by bits, the fewest last."""
    cells: dict[tuple[float, str], dict[int, Result]] = defaultdict(dict)
    for result in results:
        if "score" in result:
            cells[result["bits"], result["method"]][result["seed"]] = result
    if not cells:
        return ""
    metric = next(result["metric"] for result in results if "score" in result)
    digits = 3 if metric == "perplexity" else 2
    values = {key: {seed: r["score"] for seed, r in own.items()} for key, own in cells.items()}
    order = list(METHODS)
    rows = []
    for bits, method in sorted(cells, key=lambda key: (-key[0], order.index(key[1]))):
        own = values[bits, method]
        base = BASELINES.get(method)
        compared = difference(own, values.get((bits, base), {}), digits) if base else ""
        size = statistics.fmean(r["bytes"] for r in cells[bits, method].values())
        rows.append(
            [
                f"{bits:g}" if method not in MIXED else f"mean {bits:g}",
                f"{size / 1e6:.2f}",
                METHODS[method],
                spread(list(own.values()), digits),
                str(len(own)),
                f"{compared} ({METHODS[base]})" if compared and base else "",
            ]
        )
    unit = "accuracy, %" if metric == "accuracy" else "perplexity (lower is better)"
    header = ["bits", "MB", "method", unit, "n", "difference, seed by seed (from)"]
    return table(header, rows)


def correlations(results: Sequence[Result]) -> str:
    """How well each predictor ranks the blocks by what rounding them does."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for result in results:
        for kind, block in result.get("blocks", {}).items():
            sizes[kind] = len(block["names"])
            for predictor, value in block["rank_correlation"].items():
                found[kind, predictor].append(value)
            sums[kind].append(
                (math.fsum(block["predictors"][EXPECTED]), math.fsum(block["increase"]))
            )
    rows = [
        [f"{sizes[kind]} {KINDS[kind]}", predictor, spread(values, 2), str(len(values))]
        for (kind, predictor), values in found.items()
    ]
    if not rows:
        return ""
    text = [table(["blocks", "predictor", "rank correlation", "n"], rows), ""]
    for kind, pairs in sums.items():
        expected, measured = (spread(values, 4) for values in zip(*pairs, strict=True))
        text.append(
            f"Half the mean eigenvalue times the squared error, summed over the {KINDS[kind]}, is "
            f"{expected}, the increases {measured}."
        )
    return "\n".join(text)


def costs(results: Sequence[Result]) -> str:
    """What measuring took beside training."""
    products: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if "products" in result:
            products[result["method"]].append(result)
    parts = [
        f"{METHODS[method]}: {statistics.median(r['products'] for r in own):.0f} products, "
        f"{statistics.median(r['probe_seconds'] for r in own):.1f} s"
        for method, own in products.items()
        if method in ("trace", "eigenvalue", "budget")
    ]
    seconds = statistics.median(r["seconds"] for r in results)
    return f"Medians: a cell {seconds:.0f} s" + "".join(f"; {part}" for part in parts) + "."


def section(results: Sequence[Result]) -> str:
    """One task on one machine."""
    first = results[0]
    training = first["training"]
    commits = sorted({r["versions"].rpartition("moq ")[2] for r in results})
    versions = first["versions"].rpartition(", moq ")[0]
    dates = sorted({r["date"] for r in results})
    heading = f"### {first['model']} on {first['data']}\n\n" + (
        f"{training['first_steps']} + {training['steps']} steps of {training['batch_size']}, "
        f"learning rate {training['learning_rate']:g}, {training['granularity']}. "
        f"{first['machine'].partition(', load')[0]}; {versions}; moq {', '.join(commits)}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    parts = [heading, scores(results), correlations(results), costs(results)]
    return "\n\n".join(part for part in parts if part)


def render(results: Sequence[Result], document: Path | None = None) -> str:
    """Returns the tables, and puts them between the marks of a document.

    Raises:
        ValueError: if the document lacks the marks.
    """
    groups: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        machine = result["machine"].partition(", ")[0]
        groups[result["task"], result["settings"], machine].append(result)
    text = "\n\n".join(map(section, groups.values()))
    if document is not None:
        before, after = around_tables(document)
        document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return text


def around_tables(document: Path) -> tuple[str, str]:
    """Returns what stands before and behind the tables of a document.

    Raises:
        ValueError: if the document lacks the marks.
    """
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} must hold the lines {BEGIN} and {END}")
    return before, after
