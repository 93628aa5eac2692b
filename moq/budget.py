"""What target widths may cost together: bits a weight, bytes of the model, or measured seconds."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from moq.layout import storage_bits
from moq.strict import suggestion

Kind = Literal["mean_bits", "bytes", "latency"]

#: Of each kind of budget: the units that a number may have, in the one that it is counted in.
_UNITS: dict[Kind, dict[str, Fraction]] = {
    "mean_bits": {"": Fraction(1)},
    "bytes": {"": Fraction(1), "kB": Fraction(10**3), "MB": Fraction(10**6), "GB": Fraction(10**9)},
    "latency": {
        "": Fraction(1),
        "s": Fraction(1),
        "ms": Fraction(1, 10**3),
        "us": Fraction(1, 10**6),
    },
}
_WORDS: dict[Kind, str] = {
    "mean_bits": "bits a quantized weight",
    "bytes": "bytes of the exported tensors",
    "latency": "seconds a decode step",
}
#: Costs are whole numbers: bits, bytes, nanoseconds.
PER_SECOND = 10**9


@dataclass(frozen=True)
class Budget:
    """The most that the widths of all blocks may cost together.

    Attributes:
        kind: ``mean_bits`` (mean over all quantized weights), ``bytes`` (of all tensors of the
            exported model, scales and what is not quantized included) or ``latency`` (seconds that
            a decode step is predicted to take).
        limit: How many, exactly as it was given.
    """

    kind: Kind
    limit: Fraction

    def __post_init__(self) -> None:
        """Refuses limits that no model meets, or that look like another unit.

        Raises:
            ValueError: naming the kind and its range.
        """
        if self.kind == "mean_bits" and not 1 <= self.limit <= 16:
            raise ValueError(f"budget: mean_bits must lie in [1, 16], got {float(self.limit):g}")
        if self.kind != "mean_bits" and self.limit <= 0:
            raise ValueError(f"budget: {self.kind} must be positive, got {float(self.limit):g}")

    def __str__(self) -> str:
        """What may be used up, in words."""
        return f"{_number(self.limit)} {_WORDS[self.kind]}"

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return _WORDS[self.kind]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``mean_bits=6``, ``bytes=90MB`` or ``latency=12ms``.

        Numbers are decimal; bytes may be in kB, MB or GB (powers of 1000), latencies in s, ms or
        us.

        Raises:
            ValueError: naming the part that cannot be read, and the nearest kind of budget.

        Example:
            >>> str(Budget.parse("mean_bits=6.5"))
            '6.5 bits a quantized weight'
        """
        kind, equals, amount = text.partition("=")
        if kind not in _UNITS or not equals:
            near = suggestion(kind, _UNITS)
            raise ValueError(
                f"budget: must be one of mean_bits=N, bytes=N, latency=N, got {text!r}{near}"
            )
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d{1,2}))?([a-zA-Z]*)", amount)
        units = _UNITS[kind]
        if found is None or found[3] not in units:
            words = ", ".join(unit for unit in units if unit)
            raise ValueError(
                f"budget: {kind} must be a decimal number"
                + (f", alone or in {words}" if words else "")
                + f", got {amount!r}"
            )
        number = Fraction(found[1]) * Fraction(10) ** int(found[2] or 0)
        return cls(kind, number * units[found[3]])

    @classmethod
    def of(
        cls,
        mean_bits: float | None = None,
        bytes: int | None = None,
        latency: float | None = None,
    ) -> Budget:
        """Makes the budget that is given, of the three.

        Raises:
            ValueError: unless exactly one is given, or if it is out of range.
            TypeError: if it is no number.
        """
        given: dict[Kind, Any] = {"mean_bits": mean_bits, "bytes": bytes, "latency": latency}
        chosen = {kind: value for kind, value in given.items() if value is not None}
        if len(chosen) != 1:
            raise ValueError(
                "budget: one of mean_bits, bytes and latency must be given, got "
                + (" and ".join(chosen) or "none")
            )
        ((kind, value),) = chosen.items()
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
            raise TypeError(f"budget: {kind} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"budget: {kind} must be finite, got {value!r}")
        # The shortest decimal that a float prints as is what somebody wrote: 6.1, not 6.0999….
        return cls(kind, Fraction(value) if isinstance(value, Fraction) else Fraction(repr(value)))


def _number(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):.6g}"


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of a decode step of the whole model, at each width that was measured.

    Attributes:
        seconds: {bits: seconds} with every quantized weight at that width; 16 stands for all widths
            above 8, whose weights are stored as floats.
    """

    seconds: Mapping[int, float]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads what ``moq bench DIR --json`` printed for one directory per width.

        The file holds these objects one a line, or as one list. The width is that of ``weights``
        (int8: 8, int4: 4, floats: 16); a key ``bits`` beside it wins. Of several measurements of
        one width the fastest counts, as in `moq bench` itself.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the entry and the key that is missing or out of range, or that
                differs between entries: all must be measured alike.
        """
        entries = _parse_entries(Path(path))
        seconds: dict[int, float] = {}
        for index, entry in enumerate(entries):
            where = f"{path}: entry {index}"
            bits = _width_of(entry, where)
            for key in _SHARED_KEYS:
                if entry.get(key) != entries[0].get(key):
                    raise ValueError(
                        f"{where}: {key} must be the {entries[0].get(key)!r} of the first entry, "
                        f"got {entry.get(key)!r}: measure all widths with the same options"
                    )
            batch = _positive(entry, "batch", where)
            step = batch / _positive(entry, "decode_tokens_per_second", where)
            seconds[bits] = min(step, seconds.get(bits, step))
        return cls(dict(sorted(seconds.items())))

    def has(self, bits: int) -> bool:
        """Says whether the width that `bits` are served at was measured."""
        return served_bits(bits) in self.seconds

    def cost(self, bits: int, share: Fraction) -> int:
        """Nanoseconds that a block of `share` of all quantized weights takes of a step.

        The step is divided among the blocks by their weights. So a model of one width takes what
        was measured for it (rounded down, within a nanosecond a block), and one of several widths
        lies between.
        """
        return math.floor(Fraction(self.seconds[served_bits(bits)]) * share * PER_SECOND)


def require_table(
    budget: Budget, source: str | os.PathLike[str] | LatencyTable | None
) -> LatencyTable | None:
    """Returns the table of a latency budget.

    Raises:
        ValueError: if there is none, or one beside another budget.
    """
    if (budget.kind == "latency") != (source is not None):
        raise ValueError(
            "budget: a latency table must be given with a latency, and only then, got "
            + (f"{budget.kind} with one" if source is not None else "a latency without one")
            + ": write what moq bench DIR --json prints for one directory per width into a file"
        )
    return source if isinstance(source, LatencyTable | None) else LatencyTable.load(source)


def served_bits(bits: int) -> int:
    """Returns the width that a weight of `bits` is stored and served at; 16: as a float."""
    return 16 if bits > 8 else storage_bits(bits)


#: What a speed depends on beside the width.
_SHARED_KEYS = (
    "context",
    "batch",
    "architecture",
    "device",
    "compute_dtype",
    "kv_cache_dtype",
    "head",
    "activations",
    "tp_size",
    "transport",
    "threads",
)
_FORMAT_BITS = {"int2": 2, "int4": 4, "int8": 8, "float32": 16, "bfloat16": 16, "float16": 16}


def _parse_entries(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    try:
        parsed = json.loads(text) if text.lstrip().startswith("[") else None
        if parsed is None:
            parsed = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{path}: must hold what moq bench --json prints, one object a line or a list of them: "
            f"{error}"
        ) from None
    if not parsed or not all(isinstance(entry, dict) for entry in parsed):
        raise ValueError(
            f"{path}: must hold at least one object that moq bench --json printed, got "
            f"{'none' if not parsed else 'something else'}"
        )
    return parsed


def _width_of(entry: Mapping[str, Any], where: str) -> int:
    bits = entry.get("bits", _FORMAT_BITS.get(str(entry.get("weights"))))
    if isinstance(bits, bool) or bits not in (2, 4, 8, 16):
        raise ValueError(
            f"{where}: weights must be one of {', '.join(_FORMAT_BITS)}, or bits one of 2, 4, 8, "
            f"16, got weights {entry.get('weights')!r} and bits {entry.get('bits')!r}"
        )
    return int(bits)


def _positive(entry: Mapping[str, Any], key: str, where: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {key} must be a positive number, got {value!r}")
    return float(value)
