"""How every benchmark prints its rows: a table for people, one JSON object a line for programs."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


def machine() -> str:
    """The processor's name, its usable cores and the load that other processes put on them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else "unknown processor"
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"


@dataclass(frozen=True)
class Row:
    """One comparison in one unit; lower is better unless the unit is a rate."""

    case: str
    moq: float
    peer: float | None
    unit: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better moq is: above 1 moq wins, whether lower or higher is better."""
        if self.peer is None:
            return None
        higher_is_better = self.unit.endswith("/s") or self.unit.endswith("OPS") or self.unit == "%"
        return self.moq / self.peer if higher_is_better else self.peer / self.moq


def print_rows(title: str, peer: str, rows: list[Row], as_json: bool) -> None:
    """Prints the rows; `peer` names what moq is compared with."""
    if as_json:
        for row in rows:
            fields = {"case": row.case, "moq": row.moq, "peer": row.peer, "ratio": row.ratio}
            fields |= {"unit": row.unit, "machine": machine(), "peer_name": peer}
            print(json.dumps(fields | ({"note": row.note} if row.note else {})))
        return
    table = Table(title=title, caption=machine())
    for column in ("case", f"moq [{rows[0].unit}]", f"{peer} [{rows[0].unit}]", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        peer_text = "" if row.peer is None else f"{row.peer:.2f}"
        ratio_text = "" if row.ratio is None else f"{row.ratio:.2f}x"
        table.add_row(f"{row.case} {row.note}".strip(), f"{row.moq:.2f}", peer_text, ratio_text)
    Console().print(table)
