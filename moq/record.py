"""What an optimizer's state dict says about the quantization, beside the masters."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moq._C import Schedule
from moq.blocks import require_same_past, retarget

FORMAT = 1
# The record is one JSON string in the first param group: torch.distributed.checkpoint keeps what
# param groups hold, in all its forms, and drops every other top-level key.
RECORD_KEY = "moq"
MASTER_KEY = "moq_master"
#: Wall times of a measurement, in its entry of the history and in that entry's cost.
TIMES = {"seconds", "spent", "training_seconds"}


@dataclass(frozen=True)
class Record:
    """Everything but tensors that a resumed run needs to continue bit for bit.

    Attributes:
        step: Completed optimizer steps.
        seed: Key of stochastic rounding.
        parameters: Quantized parameters: name -> grid, block and master dtype.
        names: Names of all parameters, per param group; "" for one that the model does not own.
        schedule: Schedule.state_dict(), measurements included.
        history: Every measurement: step, measure, values per block, cost.
        blank_state: True if the inner optimizer has made no step: its state is only a form that
            loading fills in.
        activations: Moving averages of static activations, by name of the layer.
        probes: What ProbeState has: time spent on measuring, steps of the next measurements.
        target_bits: Last widths that choose_target_bits put in the place of the configured ones, by
            name of the block.
    """

    step: int
    seed: int
    parameters: dict[str, dict[str, Any]]
    names: list[list[str]]
    schedule: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    blank_state: bool = False
    activations: dict[str, float] = field(default_factory=dict)
    target_bits: dict[str, int] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the record as it stands in the first param group."""
        return json.dumps({"format": FORMAT} | asdict(self))

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> Record:
        """Finds the record in an optimizer's state dict.

        Raises:
            ValueError: if there is none, or it has another format.
        """
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                "MoQOptimizer.load_state_dict: the state must have the keys 'state' and "
                f"'param_groups', got {_some({str(key) for key in state_dict})}"
            )
        groups = state_dict["param_groups"]
        text = groups[0].get(RECORD_KEY) if groups else None
        if text is None:
            raise ValueError(
                "MoQOptimizer.load_state_dict: the state must be one of a MoQOptimizer, got one "
                "without masters and schedule; to continue from a plain optimizer's state, load it "
                "into that optimizer before wrapping it"
            )
        data = json.loads(text)
        written = data.pop("format", None)
        if written != FORMAT:
            raise ValueError(
                f"MoQOptimizer.load_state_dict: the state must have format {FORMAT}, got "
                f"{written!r}: continue with the version of moq that saved it"
            )
        return cls(**data)

    def require_same_model(self, own: Record) -> None:
        """Refuses to load into a model or configuration with other parameters or grids.

        Raises:
            ValueError: naming the parameters that differ, and how.
        """
        where = "MoQOptimizer.load_state_dict"
        saved_names = {name for group in self.names for name in group}
        own_names = {name for group in own.names for name in group}
        if saved_names != own_names:
            raise ValueError(
                f"{where}: the parameters must be those of the saved optimizer; only there: "
                f"{_some(saved_names - own_names)}; only here: {_some(own_names - saved_names)}"
            )
        if self.parameters.keys() != own.parameters.keys():
            raise ValueError(
                f"{where}: the same parameters must be quantized; only there: "
                f"{_some(self.parameters.keys() - own.parameters.keys())}; only here: "
                f"{_some(own.parameters.keys() - self.parameters.keys())}"
            )
        for name, grid in own.parameters.items():
            saved = self.parameters[name]
            different = [key for key in grid if saved.get(key) != grid[key]]
            if different:
                values = ", ".join(
                    f"{key} {grid[key]!r} (saved: {saved.get(key)!r})" for key in different
                )
                raise ValueError(f"{where}: {name} must be as it was saved, got {values}")
        if self.seed != own.seed:
            raise ValueError(f"{where}: seed must be the saved {self.seed}, got {own.seed}")

    def resumed_schedule(self, configured: Schedule) -> Schedule:
        """Returns the configured schedule with the saved target widths and measurements.

        Raises:
            ValueError: if it contradicts what happened until the saved step.
        """
        state = retarget(configured, self.target_bits).state_dict()
        resumed = Schedule.from_state_dict(state | {"measurements": self.schedule["measurements"]})
        saved = Schedule.from_state_dict(self.schedule)
        require_same_past(saved, resumed, self.step, "MoQOptimizer.load_state_dict")
        return resumed

    def summary(self) -> dict[str, Any]:
        """Returns what an exported checkpoint tells about its training."""
        schedule = Schedule.from_state_dict(self.schedule)
        plan = dict(zip(schedule.block_names, schedule.plan(), strict=True))
        return {
            "step": self.step,
            "total_steps": schedule.total_steps,
            "schedule": self.schedule,
            "seed": self.seed,
            "drops": {name: [list(drop) for drop in drops] for name, drops in plan.items()},
            "sensitivities": self.history,
            "blocks": {name: grid["block"] for name, grid in self.parameters.items()},
            "target_bits": self.target_bits,
        }


def without_times(history: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint tells of `Record.summary()`: all but wall times.

    These differ whenever the same training is repeated, and its bytes must not.
    """
    measured = history.get("sensitivities")
    if not isinstance(measured, list):
        return dict(history)
    return dict(history) | {"sensitivities": [_timeless(entry) for entry in measured]}


def _timeless(entry: Any) -> Any:
    """A measurement, or its cost, without seconds."""
    if not isinstance(entry, Mapping):
        return entry
    return {
        key: _timeless(value) if key == "cost" else value
        for key, value in entry.items()
        if key not in TIMES
    }


class Pace:
    """Wall time of the steps that this process has made.

    From the end of one step to the end of the next, evaluations between them included; on a GPU as
    the host makes them, which over many steps comes to the same.

    Attributes:
        steps: Steps that were timed.
        seconds: Their time together.
    """

    def __init__(self) -> None:
        """Has timed nothing yet."""
        self.steps = 0
        self.seconds = 0.0
        self._last: float | None = None

    def step(self) -> None:
        """Counts a step that has ended now."""
        now = time.perf_counter()
        if self._last is not None:
            self.steps += 1
            self.seconds += now - self._last
        self._last = now

    def interrupt(self) -> None:
        """Leaves out what happens until the next step ends: it is no training."""
        self._last = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what a saved run says of it."""
        return {"steps": self.steps, "seconds": self.seconds}


def _some(names: set[str]) -> str:
    """Lists a few names."""
    shown = sorted(name or "(not the model's)" for name in names)
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return (", ".join(shown[:5]) + more) or "none"
