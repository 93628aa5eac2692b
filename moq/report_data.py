"""What the report shows, read from a saved run and checked: plans, probes, figures, spectra."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moq._C import Schedule
from moq.blocks import layer_of
from moq.directory_kind import RUN_NAME
from moq.manifest import CONFIG_NAME, FormatError, read_json
from moq.report_axis import Point
from moq.report_html import short_names
from moq.saved_run import SCALARS_NAME, read_run
from moq.spectrum import SPECTRA_KEY, SpectralDensity
from moq.staging import recover

MEASURES = ("trace", "eigenvalue", "both")

Drops = list[tuple[int, int]]
"""(step, bits), widest first: the first is the width at the start."""


@dataclass(frozen=True)
class Layer:
    """One block of the schedule.

    Attributes:
        name, label: Whole, and short enough for a chart.
        num_weights: Elements of its quantized matrices that the run knows; 0 if it tells none.
        earliest, latest: Bounds of the plan before anything was measured.
        even: The plan if no sensitivity had been measured.
        drops: The plan as it is now; up to the run's step it is what happened.
    """

    name: str
    label: str
    earliest: Drops
    latest: Drops
    even: Drops
    drops: Drops

    def bits_at(self, step: int) -> int:
        """Returns the width after so many steps."""
        return min(bits for at, bits in self.drops if at <= step)

    @property
    def whole(self) -> str:
        """The layer of which this is all or, where rules split it, a part."""
        return layer_of(self.name)

    @property
    def start_bits(self) -> int:
        """The first width."""
        return self.drops[0][1]

    @property
    def target_bits(self) -> int:
        """The last width."""
        return self.drops[-1][1]

    @property
    def arrival(self) -> int:
        """Step at which the last width is reached."""
        return self.drops[-1][0]


@dataclass(frozen=True)
class Probe:
    """One measurement of sensitivity.

    Attributes:
        step: Completed steps.
        measure: One of MEASURES.
        values, normalised, errors: By block.
        products, converged: As in moq.estimators.Sensitivity; None: not told.
        seconds: Wall time with all that belongs to it, on the slowest rank; None: not told.
        training_seconds: Of the whole training, as far as could be told then; None: not told.
        max_cost: Share of `training_seconds` that all probes could take; None: any.
        form: Of the matrix, if the run tells: as in moq.estimators.Sensitivity.
    """

    step: int
    measure: str
    values: dict[str, float]
    normalised: dict[str, float]
    errors: dict[str, float]
    products: int | None
    seconds: float | None
    converged: bool | None
    form: str | None
    training_seconds: float | None
    max_cost: float | None


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run tells without its weights.

    Attributes:
        directory: The run.
        model: What its config.json calls it.
        step, total_steps: Steps made, and planned.
        layers: In the model's order.
        chosen: Targets that a budget set, by block.
        probes: In order.
        scalars: Figures that a CsvLogger heard: name -> (step, value) by step; up to `step`.
        scalars_file: Where they are from; None without.
        spectra: Of some blocks.
        seconds_per_step: Wall time; None: not told.
        blocks: Name of a weight -> its block.
    """

    directory: Path
    model: str
    step: int
    total_steps: int
    layers: list[Layer]
    chosen: dict[str, int]
    probes: list[Probe]
    scalars: dict[str, list[Point]]
    scalars_file: Path | None
    spectra: list[SpectralDensity]
    seconds_per_step: float | None
    blocks: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether all planned steps were made."""
        return self.step >= self.total_steps

    @property
    def training_seconds(self) -> float | None:
        """Wall time of all planned steps: as the steps made took, or as was thought before any."""
        if self.seconds_per_step is not None:
            return self.seconds_per_step * self.total_steps
        thought = [p.training_seconds for p in self.probes if p.training_seconds is not None]
        return thought[-1] if thought else None

    def scalar(self, name: str, layer: str | None = None) -> list[Point]:
        """Returns one of moq's own scalars, of the model or of a block."""
        return self.scalars.get(f"moq/{name}" + (f"/{layer}" if layer else ""), [])

    def figures(self) -> dict[str, list[Point]]:
        """Returns what is not moq's own: losses, accuracies."""
        return {n: points for n, points in self.scalars.items() if not n.startswith("moq/")}


def read_record(
    directory: str | os.PathLike[str], scalars: str | os.PathLike[str] | None = None
) -> RunRecord:
    """Reads a run that MoQOptimizer.save wrote.

    Args:
        directory: The run.
        scalars: File of a CsvLogger; None takes the copy in the run, if there is one.

    Raises:
        FormatError: naming file and key, if the directory holds no run, or one that says too
            little, or if a file is damaged.
    """
    recover(directory)
    path = Path(directory)
    run = read_run(path)
    where, history = path / RUN_NAME, run["history"]
    if "schedule" not in history:
        raise FormatError(
            f"{where}: history.schedule must hold the plan, and is missing: the run was saved by "
            "an older moq; load its state (optimizer.load_state_dict) and save it again"
        )
    step = _get(history, "step", int, where)
    layers, total_steps = _layers(_get(history, "schedule", dict, where), where)
    named = _get(history, "blocks", dict, where)
    probes = [
        _probe(entry, f"{where}: history.sensitivities[{i}]")
        for i, entry in enumerate(_get(history, "sensitivities", list, where))
    ]
    source = Path(scalars) if scalars is not None else path / SCALARS_NAME
    found = scalars is not None or source.is_file()
    return RunRecord(
        directory=path,
        model=_model_name(read_json(path / CONFIG_NAME)),
        step=step,
        total_steps=total_steps,
        layers=layers,
        chosen=_get(history, "target_bits", dict, where),
        probes=probes,
        scalars=_read_scalars(source, step) if found else {},
        scalars_file=source if found else None,
        spectra=_spectra(history, where),
        seconds_per_step=_seconds_per_step(run.get("pace") or {}, where),
        blocks=named,
    )


def _get(entry: Mapping[str, Any], key: str, kind: type, where: object) -> Any:
    value = entry.get(key)
    good = isinstance(value, (int, float) if kind is float else kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        words = {int: "an integer", float: "a number", str: "a string", list: "a list"}
        words |= {bool: "true or false"}
        raise FormatError(f"{where}: {key} must be {words.get(kind, 'an object')}, got {value!r}")
    return value


def _get_if_told(entry: Mapping[str, Any], key: str, kind: type, where: object) -> Any:
    return None if entry.get(key) is None else _get(entry, key, kind, where)


def _numbers(entry: Mapping[str, Any], key: str, count: int | None, where: object) -> list[float]:
    values = _get(entry, key, list, where)
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values) or (
        count is not None and len(values) != count
    ):
        many = "numbers" if count is None else f"{count} numbers"
        raise FormatError(f"{where}: {key} must be a list of {many}, got {str(values)[:80]}")
    return [float(v) for v in values]


def _layers(state: dict[str, Any], where: Path) -> tuple[list[Layer], int]:
    """The plan before and after the measurements."""
    try:
        now = Schedule.from_state_dict(state)
        before = Schedule.from_state_dict(state | {"measurements": []})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{where}: history.schedule: {error}") from error
    earliest, latest = before.bounds()
    names = now.block_names
    plans = zip(names, short_names(names), earliest, latest, before.plan(), now.plan(), strict=True)
    return [Layer(*plan) for plan in plans], now.total_steps


def _probe(entry: Any, where: str) -> Probe:
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: must be an object, got {entry!r}")
    blocks, measure = _get(entry, "blocks", list, where), _get(entry, "measure", str, where)
    if measure not in MEASURES:
        raise FormatError(f"{where}: measure must be one of {list(MEASURES)}, got {measure!r}")

    cost = _get(entry, "cost", dict, where) if "cost" in entry else {}
    timed = cost if "seconds" in cost else entry

    def by_block(key: str) -> dict[str, float]:
        return dict(zip(blocks, _numbers(entry, key, len(blocks), where), strict=True))

    return Probe(
        step=_get(entry, "step", int, where),
        measure=measure,
        values=by_block("values"),
        normalised=by_block("normalised"),
        errors=by_block("standard_error") if entry.get("standard_error") else {},
        products=_get_if_told(entry, "products", int, where),
        seconds=_get_if_told(timed, "seconds", float, where),
        converged=_get_if_told(entry, "converged", bool, where),
        form=_get_if_told(entry, "form", str, where),
        training_seconds=_get_if_told(cost, "training_seconds", float, where),
        max_cost=_get_if_told(cost, "max_cost", float, where),
    )


def _model_name(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "model"


def _seconds_per_step(pace: Mapping[str, Any], where: Path) -> float | None:
    if not pace:
        return None
    steps, seconds = _get(pace, "steps", int, where), _get(pace, "seconds", float, where)
    return seconds / steps if steps else None


def _read_scalars(path: Path, last_step: int) -> dict[str, list[Point]]:
    """Reads a CsvLogger's file; a step that was logged twice counts as it was logged last.

    A training that was resumed from an earlier state has logged steps again, and may have left
    some beyond its own last one.
    """
    values: dict[str, dict[int, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            if next(rows, ["step", "name", "value"]) != ["step", "name", "value"]:
                raise ValueError("must begin with the columns step, name, value")
            for row in rows:
                try:
                    step, name, value = int(row[0]), row[1], float(row[2])
                except (ValueError, IndexError):
                    raise ValueError(
                        f"line {rows.line_num} must hold a step, a name and a number, got "
                        f"{','.join(row)[:80]!r}"
                    ) from None
                if step <= last_step:
                    values.setdefault(name, {})[step] = value
    except (OSError, ValueError, csv.Error) as error:
        words = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"{path}: {words}") from error
    return {
        name: [(float(s), value) for s, value in sorted(points.items())]
        for name, points in values.items()
    }


def _spectra(history: Mapping[str, Any], where: Path) -> list[SpectralDensity]:
    spectra = []
    for i, entry in enumerate(history.get(SPECTRA_KEY, [])):
        place = f"{where}: history.{SPECTRA_KEY}[{i}]"
        if not isinstance(entry, dict):
            raise FormatError(f"{place}: must be an object, got {entry!r}")
        values = _numbers(entry, "values", None, place)
        _numbers(entry, "density", len(values), place)
        try:
            spectra.append(SpectralDensity.from_dict(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{place}: must be a spectral density, got {error}") from error
    return spectra


def in_order(names: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """Sorts names of blocks as the layers stand; what is no layer comes last."""
    place = {layer.name: i for i, layer in enumerate(layers)}
    return sorted(names, key=lambda name: place.get(name, len(place)))
