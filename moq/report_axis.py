"""Axes of the report's charts: where a value is, and which values are named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moq.report_html import number

Point = tuple[float, float]

#: Units of a chart's box, from one end of an axis to the other.
BOX = 1000


@dataclass(frozen=True)
class Axis:
    """A range of values on one side of a chart.

    Attributes:
        low, high: Its ends.
        title: What it measures, with the unit.
        log: Whether decades are equally long.
    """

    low: float
    high: float
    title: str
    log: bool = False

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        title: str,
        *,
        log: bool = False,
        tight: bool = False,
        zero: bool = True,
    ) -> Axis:
        """Makes an axis that holds all finite values.

        Args:
            values: What is drawn.
            title: As the attribute.
            log: As the attribute; then values that are not positive do not count.
            tight: Without a margin.
            zero: Whether it begins at 0 where that is near.
        """
        usable = [float(v) for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not usable:
            return cls(1 if log else 0, 10 if log else 1, title, log)
        low, high = min(usable), max(usable)
        if log:
            low, high = (low / 1.3, high * 1.3) if low < high or not tight else (low / 3, high * 3)
            return cls(low, high, title, True)
        if low == high:
            low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
        margin = 0.0 if tight else 0.06 * (high - low)
        return cls(0.0 if zero and 0 <= low < 0.3 * high else low - margin, high + margin, title)

    def place(self, value: float) -> float:
        """Returns where a value is, from 0 to BOX; what lies outside is moved to the end."""
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return BOX * min(max(share, 0.0), 1.0)

    def ticks(self, most: int) -> list[float]:
        """Returns round values, at most about `most`, within the range."""
        if self.log:
            decades = math.log10(self.high / self.low)
            if decades >= 1.5:
                every = max(1, math.ceil(decades / most))
                first = math.ceil(math.log10(self.low))
                return [10.0**e for e in range(first, math.floor(math.log10(self.high)) + 1, every)]
        step = (self.high - self.low) / max(most, 1)
        unit = 10.0 ** math.floor(math.log10(step))
        step = next(unit * f for f in (1, 2, 5, 10) if unit * f >= step * 0.999)
        count = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [round(i * step, 12) for i in count]

    def words(self, values: Sequence[float]) -> list[str]:
        """Writes ticks, all with as many digits behind the point as one of them needs."""
        if self.log or any(value and not 1e-4 <= abs(value) < 1e7 for value in values):
            return [number(value, 1 if self.log else 3) for value in values]
        places = max((len(f"{v:.10g}".partition(".")[2]) for v in values), default=0)
        return [f"{value:,.{places}f}".replace("-", "−") for value in values]
