"""What loggers are told about a training, measured without making a step wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moq._C import Schedule, Trainer
from moq.blocks import blend_end
from moq.loggers import CsvLogger, Logger, TensorBoardLogger
from moq.masters import Masters
from moq.reporting import is_main_process
from moq.sharding import local_tensor

#: What is summed over the weights of a block: squared quantization error, squared master, weights
#: whose code changed in the step, weights.
SUMS = 4
#: Weights that are looked at together, at most, unless one is larger.
CHUNK_ELEMENTS = 1 << 18


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
        self._chunks: list[_Chunk] = []
        self._chunked: Trainer | None = None
        self._pending: deque[_Measurement] = deque()

    def before_step(self, masters: Masters) -> None:
        """Remembers the codes that the weights have now, if this step is to be measured."""
        self._codes = None  # of a step that failed
        due = self._calls % self.every == 0
        self._calls += 1
        wanted = bool(self.loggers) and masters.matched and (masters.sharded or is_main_process())
        if due and wanted and not _is_capturing():
            if self._chunked is not masters.trainer:  # another one wherever weights are added
                self._chunks, self._chunked = _chunks(masters), masters.trainer
            self._codes = list(_codes(masters, self._chunks))

    @torch.no_grad()
    def after_step(self, masters: Masters) -> None:
        """Measures, if `before_step` saw that it is time, and tells what has arrived."""
        if self._codes is not None:
            before, self._codes = self._codes, None
            values = _measure(masters, self._chunks, before)
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
        for logger in self.loggers if wait and is_main_process() else ():
            if isinstance(logger, TensorBoardLogger):
                logger.flush()

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


class _Chunk(NamedTuple):
    """Weights that are looked at together: of one block, on one device, with one kind of grid.

    Attributes:
        block: Number of the block.
        members: Their places in Masters.matched.
        grid: Arguments of the operator that computes their integers, of all in one call; None: a
            single weight whose scales are learned, or shared with other ranks.
    """

    block: int
    members: list[int]
    grid: dict[str, Any] | None


def _chunks(masters: Masters) -> list[_Chunk]:
    """Returns all weights in chunks; a large weight is one of its own.

    What is computed of a chunk takes memory, and a call takes the host's time, however small the
    weights are.
    """
    filling: dict[Any, _Chunk] = {}
    elements: dict[Any, int] = {}
    chunks: list[_Chunk] = []
    for index, (m, block) in enumerate(masters.placed()):
        weight = local_tensor(m.parameter)
        own = m.spec.scale == "learned" or masters.shared_scales.row(m.parameter) is not None
        grid = {
            "granularity": m.granularity,
            "group_size": m.group_size,
            "mode": m.spec.mode,
            "transposed": m.transposed,
        }
        # Rows of one length, each with scales of its own, may as well be those of one matrix.
        alone = index if own or m.granularity in ("per_tensor", "per_rows") else None
        columns = weight.shape[0 if m.transposed else 1]  # of this rank's shard
        key = (block, weight.device, weight.dtype, columns, alone, *grid.values())
        if key not in filling or elements[key] + weight.numel() > CHUNK_ELEMENTS:
            filling[key] = _Chunk(block, [], None if own else grid)
            chunks.append(filling[key])
            elements[key] = 0
        filling[key].members.append(index)
        elements[key] += weight.numel()
    return chunks


def _codes(masters: Masters, chunks: Sequence[_Chunk]) -> Iterator[torch.Tensor]:
    """Yields the integers of the simulated weights, which lie on their grid already, by chunk."""
    trainer = masters.trainer
    schedule, earliest, latest = trainer.schedule, trainer.step_seen, trainer.step_at_most
    for chunk in chunks:
        yield _codes_of(masters, chunk, _widths(schedule, chunk.block, earliest, latest))


def _codes_of(masters: Masters, chunk: _Chunk, widths: Sequence[int]) -> torch.Tensor:
    first, *others = widths
    codes_at = _codes_by_width(masters, chunk)
    codes = codes_at(first)
    # Only the device knows which of the drops that the host asked for it has reached.
    for num_bits in others:
        reached = masters.trainer.control_of(chunk.members[0])[0] == num_bits
        codes = torch.where(reached, codes_at(num_bits), codes)
    return codes.reshape(-1)


def _widths(schedule: Schedule, block: int, earliest: int, latest: int) -> list[int]:
    """Returns the widths that a block may have after so many completed steps."""
    widths = [schedule.bits_at(block, earliest)]
    if schedule.bits_at(block, latest) != widths[0]:
        widths += [bits for at, bits in schedule.plan()[block] if earliest < at <= latest]
    return widths


def _codes_by_width(masters: Masters, chunk: _Chunk) -> Callable[[int], torch.Tensor]:
    """Returns what computes a chunk's integers at a width.

    Ranks may ask it for different widths, and differently often: what they must do together is done
    here.
    """
    if chunk.grid is not None:
        weights = _simulated(masters, chunk)
        rows = 1 if chunk.grid["transposed"] else 0
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=rows)
        return partial(_quantized, weight, **chunk.grid)
    m = masters.matched[chunk.members[0]]
    if masters.simulators is not None:
        return partial(masters.simulators.of(m).codes, m.parameter.detach())
    weight = masters.shared_scales.with_extremes(m.parameter, local_tensor(masters.simulated(m)))
    grid = {"granularity": m.granularity, "mode": m.spec.mode}
    return lambda num_bits: _quantized(weight, num_bits, **grid)[:, :-2]


def _quantized(weight: torch.Tensor, num_bits: int, **grid: Any) -> torch.Tensor:
    codes: torch.Tensor = torch.ops.moq.quantize(weight, num_bits, **grid)[0]
    return codes


def _simulated(masters: Masters, chunk: _Chunk) -> list[torch.Tensor]:
    return [local_tensor(masters.simulated(masters.matched[i])) for i in chunk.members]


def _measure(
    masters: Masters, chunks: Sequence[_Chunk], before: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Returns completed steps and the sums of each block, [1 + SUMS * blocks], float64."""
    step = masters.trainer.step_on_device
    whole = [local_tensor(master.detach()) for _, master in masters.pairs()]
    sums: list[list[torch.Tensor]] = [[] for _ in masters.blocks.names]
    now = _codes(masters, chunks)  # one chunk at a time: all together they are as large as before
    for chunk, old, new in zip(chunks, before, now, strict=True):
        flips = torch.count_nonzero(old != new).to(torch.float64).reshape(1)
        count = torch.full((1,), len(new), dtype=torch.float64, device=new.device)
        squares = _squares(_simulated(masters, chunk), [whole[i] for i in chunk.members])
        sums[chunk.block].append(
            torch.cat([squares, flips, count]).to(step.device, non_blocking=True)
        )
    rows = [torch.stack(parts).sum(dim=0) if parts[1:] else parts[0] for parts in sums]
    return torch.cat([step.to(torch.float64), *rows])


def _squares(simulated: list[torch.Tensor], whole: list[torch.Tensor]) -> torch.Tensor:
    """Returns the squared norms of simulated minus full-precision weights, and of these, [2]."""
    errors = torch._foreach_sub(simulated, whole)
    norms = [*torch._foreach_norm(errors, 2, dtype=torch.float64)]
    norms += torch._foreach_norm(whole, 2, dtype=torch.float64)
    return torch.stack(norms).square().reshape(2, -1).sum(1)


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
