"""How every benchmark prints its rows: a table for people, one JSON object a line for programs."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def machine() -> str:
    """The processor's name, its usable cores and the load that other processes put on them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else "unknown processor"
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"


@dataclass(frozen=True)
class Target:
    """What a figure of a row is to reach."""

    figure: str
    found: float
    limit: float
    at_most: bool  # or at least

    @property
    def met(self) -> bool:
        """Whether the figure does."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def __str__(self) -> str:
        """The figure and its limit, and loudly if it is beyond."""
        sign = "<=" if self.at_most else ">="
        missed = "" if self.met else "MISSED: "
        return f"{missed}{self.figure} {self.found:.4g} {sign} {self.limit:.4g}"


@dataclass(frozen=True)
class Row:
    """One comparison in one unit; lower is better unless the unit is a rate."""

    case: str
    moq: float
    peer: float | None
    unit: str
    note: str = ""
    targets: Sequence[Target] = ()

    @property
    def ratio(self) -> float | None:
        """How many times better moq is: above 1 moq wins, whether lower or higher is better."""
        if self.peer is None:
            return None
        higher_is_better = self.unit.endswith("/s") or self.unit.endswith("OPS") or self.unit == "%"
        return self.moq / self.peer if higher_is_better else self.peer / self.moq


def print_rows(
    title: str, peer: str, rows: list[Row], as_json: bool, facts: dict[str, str] | None = None
) -> None:
    """Prints the rows.

    Args:
        title: what was measured.
        peer: what moq is compared with.
        rows: at least one.
        as_json: one object a line instead of a table.
        facts: where and when it was measured; None: this machine's processor.
    """
    facts = {"machine": machine()} if facts is None else facts
    if as_json:
        for row in rows:
            fields = {"case": row.case, "moq": row.moq, "peer": row.peer, "ratio": row.ratio}
            fields |= {"unit": row.unit, **facts, "peer_name": peer}
            if row.note:
                fields["note"] = row.note
            if row.targets:
                fields["targets"] = [str(target) for target in row.targets]
                fields["met"] = all(target.met for target in row.targets)
            print(json.dumps(fields), flush=True)
        return
    header = ["case", f"moq [{rows[0].unit}]", f"{peer} [{rows[0].unit}]", "ratio"]
    cells = [
        [
            " ".join(filter(None, [row.case, row.note, *(f"[{t}]" for t in row.targets)])),
            f"{row.moq:.3g}" if row.moq < 10 else f"{row.moq:.1f}",
            "" if row.peer is None else f"{row.peer:.3g}" if row.peer < 10 else f"{row.peer:.1f}",
            "" if row.ratio is None else f"{row.ratio:.2f}x",
        ]
        for row in rows
    ]
    _print_table(title, "; ".join(facts.values()), header, cells)


def _print_table(title: str, caption: str, header: list[str], cells: list[list[str]]) -> None:
    """A table with rich, or without it where it is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        print(title)
        for row in [header, *cells]:
            first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
            print("  ".join([first.strip().ljust(widths[0]), *others]))
        print(caption, flush=True)
        return
    table = Table(title=title, caption=caption)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    # Units in brackets are no markup.
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
