"""What loggers are told about a training, measured without making a step wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
import torch.distributed as dist

from moq._C import Schedule
from moq.blocks import blend_end
from moq.loggers import CsvLogger, Logger
from moq.masters import Masters
from moq.reporting import is_main_process
from moq.rules import MatchedParameter
from moq.sharding import local_tensor

#: What is summed over the weights of a block: squared quantization error, squared master, weights
#: whose code changed in the step, weights.
SUMS = 4


@dataclass(frozen=True)
class _Measurement:
    """Numbers of one step on their way to the host.

    Attributes:
        values: float64: completed steps, then the sums of each block [SUMS * blocks], or one number
            for each of `names`.
        arrived: Recorded behind the copy; None if the values are there.
        names: Of figures that somebody else measured; None for the sums of the blocks.
    """

    values: torch.Tensor
    arrived: torch.cuda.Event | None
    names: tuple[str, ...] | None = None


class ScalarLog:
    """Measures every few steps and tells the loggers once the numbers have reached the host.

    Everything is computed and copied on the device's own stream; a logger hears of a step at one of
    the next steps. On the main process only; with sharded parameters the other ranks measure too.

    Args:
        loggers: Who is told.
        every: Steps between two measurements, >= 1.
    """

    def __init__(self, loggers: Sequence[Logger], every: int) -> None:
        """Measures nothing yet.

        Raises:
            TypeError: if a logger has no method ``log``.
            ValueError: if `every` is not at least 1.
        """
        for logger in loggers:
            require_logger(logger)
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"MoQOptimizer: log_every must be an integer, got {every!r}")
        if every < 1:
            raise ValueError(f"MoQOptimizer: log_every must be at least 1, got {every}")
        self.loggers = list(loggers)
        self.every = every
        self._calls = 0
        self._codes: list[torch.Tensor] | None = None
        self._pending: deque[_Measurement] = deque()

    def before_step(self, masters: Masters) -> None:
        """Remembers the codes that the weights have now, if this step is to be measured."""
        self._codes = None  # of a step that failed
        due = self._calls % self.every == 0
        self._calls += 1
        wanted = bool(self.loggers) and masters.matched and (masters.sharded or is_main_process())
        if due and wanted and not _is_capturing():
            self._codes = _codes(masters)

    @torch.no_grad()
    def after_step(self, masters: Masters) -> None:
        """Measures, if `before_step` saw that it is time, and tells what has arrived."""
        if self._codes is not None:
            before, self._codes = self._codes, None
            values = _measure(masters, before)
            if masters.sharded and dist.is_initialized():
                dist.all_reduce(values[1:])
            self._pending.append(_to_host(values))
        self.deliver(masters, wait=False)

    def deliver(self, masters: Masters, *, wait: bool) -> None:
        """Tells the loggers what has arrived, or with `wait` everything that was measured."""
        while self._pending:
            arrived = self._pending[0].arrived
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():  # type: ignore[no-untyped-call]
                    return
            measured = self._pending.popleft()
            values = measured.values.tolist()
            if is_main_process():
                if measured.names is None:
                    scalars = _scalars(masters, values)
                else:
                    scalars = dict(zip(measured.names, values[1:], strict=True))
                self.tell(scalars, step=int(values[0]))

    @torch.no_grad()
    def add(self, figures: Mapping[str, float | torch.Tensor], masters: Masters) -> None:
        """Tells figures of the present step, those on a device once they have arrived.

        Raises:
            TypeError: for a value that is no number.
            ValueError: for a name that moq uses, or a tensor of several numbers.
        """
        for name, value in figures.items():
            _require_figure(name, value)
        if not (figures and self.loggers and is_main_process()):
            return
        step = masters.trainer.step_on_device
        values = [
            value.detach().reshape(()).to(step.device, torch.float64, non_blocking=True)
            if isinstance(value, torch.Tensor)
            else torch.full((), float(value), dtype=torch.float64, device=step.device)
            for value in figures.values()
        ]
        sent = _to_host(torch.stack([step.reshape(()).to(torch.float64), *values]))
        self._pending.append(_Measurement(sent.values, sent.arrived, tuple(figures)))
        self.deliver(masters, wait=False)

    def file(self) -> Path | None:
        """Returns the file of the first CsvLogger; None without one."""
        return next((one.path for one in self.loggers if isinstance(one, CsvLogger)), None)

    def tell(self, scalars: dict[str, float], step: int) -> None:
        """Hands scalars to every logger."""
        for logger in self.loggers:
            logger.log(dict(scalars), step=step)


def require_logger(logger: object) -> None:
    """Refuses what cannot be told anything.

    Raises:
        TypeError: naming its type.
    """
    if not isinstance(logger, Logger):
        raise TypeError(
            "MoQOptimizer: loggers must have a method log(scalars, step=…), got "
            f"{type(logger).__name__}"
        )


def _require_figure(name: str, value: object) -> None:
    where = "MoQOptimizer.log"
    if not isinstance(name, str):
        raise TypeError(f"{where}: names must be strings, got {name!r}")
    if not name or name.startswith("moq/"):
        raise ValueError(f"{where}: names must not be empty or begin with 'moq/', got {name!r}")
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{where}: {name!r} must be one number, got a tensor of {list(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name!r} must be a number or a tensor of one, got {value!r}")


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _codes(masters: Masters) -> list[torch.Tensor]:
    """The integers of every simulated weight, which lies on its grid already."""
    trainer = masters.trainer
    schedule, earliest, latest = trainer.schedule, trainer.step_seen, trainer.step_at_most
    codes = []
    for index, (m, block) in enumerate(masters.placed()):
        first, *others = _widths(schedule, block, earliest, latest)
        found = _codes_on_grid(masters, m, first)
        # Only the device knows which of the drops that the host asked for it has reached.
        for num_bits in others:
            reached = trainer.control_of(index)[0] == num_bits
            found = torch.where(reached, _codes_on_grid(masters, m, num_bits), found)
        codes.append(found)
    return codes


def _widths(schedule: Schedule, block: int, earliest: int, latest: int) -> list[int]:
    """Returns the widths that a block may have after so many completed steps."""
    widths = [schedule.bits_at(block, earliest)]
    if schedule.bits_at(block, latest) != widths[0]:
        widths += [bits for at, bits in schedule.plan()[block] if earliest < at <= latest]
    return widths


def _codes_on_grid(masters: Masters, m: MatchedParameter, num_bits: int) -> torch.Tensor:
    if masters.simulators is not None and m.spec.scale == "learned":
        return masters.simulators.of(m).codes(m.parameter.detach(), num_bits)
    weight, transposed, extremes = local_tensor(masters.simulated(m)), m.transposed, 0
    if masters.shared_scales.row(m.parameter) is not None:
        weight = masters.shared_scales.with_extremes(m.parameter, weight)
        transposed, extremes = False, 2
    found: torch.Tensor = torch.ops.moq.quantize(
        weight,
        num_bits,
        granularity=m.granularity,
        group_size=m.group_size,
        mode=m.spec.mode,
        transposed=transposed,
    )[0]
    return found[:, : found.shape[1] - extremes]


def _measure(masters: Masters, before: list[torch.Tensor]) -> torch.Tensor:
    """Returns completed steps and the sums of each block, [1 + SUMS * blocks], float64."""
    step = masters.trainer.step_on_device
    sums: list[list[torch.Tensor]] = [[] for _ in masters.blocks.names]
    for (m, block), (_, master), old, new in zip(
        masters.placed(), masters.pairs(), before, _codes(masters), strict=True
    ):
        whole = local_tensor(master.detach())
        error = local_tensor(masters.simulated(m)).to(whole.dtype) - whole
        row = [
            torch.linalg.vector_norm(error, dtype=torch.float64).square(),
            torch.linalg.vector_norm(whole, dtype=torch.float64).square(),
            (old != new).sum(dtype=torch.float64),
            torch.full((), whole.numel(), dtype=torch.float64, device=whole.device),
        ]
        sums[block].append(torch.stack(row).to(step.device, non_blocking=True))
    return torch.cat([step.to(torch.float64), *(torch.stack(rows).sum(dim=0) for rows in sums)])


def _to_host(values: torch.Tensor) -> _Measurement:
    if not values.is_cuda:
        return _Measurement(values, None)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(values.device))
    return _Measurement(host, arrived)


def _scalars(masters: Masters, values: Sequence[float]) -> dict[str, float]:
    """Names the numbers of one step: those of the model, then those of each block."""
    step, schedule = int(values[0]), masters.trainer.schedule
    plans, names = schedule.plan(), masters.blocks.names
    blends = _blend_ratios(masters, plans, step)
    total = [0.0] * SUMS
    weighted_bits = 0.0
    by_block: dict[str, float] = {}
    for block, name in enumerate(names):
        sums = values[1 + SUMS * block : 1 + SUMS * (block + 1)]
        total = [a + b for a, b in zip(total, sums, strict=True)]
        bits = schedule.bits_at(block, step)
        weighted_bits += bits * sums[3]
        by_block |= {f"moq/bits/{name}": float(bits)} | _ratios(sums, f"/{name}")
        if block in blends:
            by_block[f"moq/blend_ratio/{name}"] = blends[block]
    scalars = {"moq/bits": weighted_bits / max(total[3], 1.0)} | _ratios(total, "")
    if blends:
        scalars["moq/blend_ratio"] = max(blends.values())
    return scalars | by_block


def _ratios(sums: Sequence[float], suffix: str) -> dict[str, float]:
    squared_error, squared_master, flips, count = sums
    return {
        f"moq/quantization_error{suffix}": (squared_error / squared_master) ** 0.5
        if squared_master
        else 0.0,
        f"moq/flips{suffix}": flips / max(count, 1.0),
    }


def _blend_ratios(
    masters: Masters, plans: Sequence[Sequence[tuple[int, int]]], step: int
) -> dict[int, float]:
    """Returns the share of full precision in the weights of each block that blends at all."""
    ratios: dict[int, float] = {}
    for m, block in masters.placed():
        if m.spec.blend_steps:
            left = blend_end(plans[block], m.spec.blend_steps, step) - step
            ratios[block] = max(ratios.get(block, 0.0), left / m.spec.blend_steps)
    return ratios
