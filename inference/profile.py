"""`bench --profile`: where the time of a decode step on a GPU goes, kernel by kernel."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from moq.inference.api import Engine


@dataclass
class KernelTime:
    """Kernels of one kind in a decode step; times in microseconds per step."""

    what: str
    count: int
    microseconds: float  # from one kernel's end to the end of the next: what it adds to the step
    busy: float  # from its own start: it may start while the one before is still at work
    bytes: int

    @property
    def terabytes_per_second(self) -> float:
        """Bytes over the time that the kernels add to a step."""
        return self.bytes / self.microseconds / 1e6 if self.microseconds else 0.0


def read_bandwidth(device: str, size: int = 1 << 30) -> float:
    """Measured read bandwidth of a GPU, TB/s: the better way to read 1 GiB, median of 20."""
    data = torch.zeros(size, dtype=torch.uint8, device=device)
    rates: list[float] = [
        statistics.median(torch.ops.moq.read_bandwidth(data, prefetch=prefetch) for _ in range(20))
        for prefetch in (False, True)
    ]
    return max(rates) / 1e12


def profile_decode(
    engine: Engine, prompts: list[list[int]], new_tokens: int
) -> tuple[list[KernelTime], float]:
    """Kernel times of a decode step of the prompts' batch, and the whole step's microseconds.

    Raises:
        ValueError: on the CPU, for several ranks or too few steps, or if the profiler saw other
            kernels than the engine launched.
    """
    if not engine.core.device.startswith("cuda"):
        raise ValueError(f"--profile needs --device cuda, got {engine.core.device}")
    if engine.core.tp_size > 1:
        raise ValueError(f"--profile needs one process, got {engine.core.tp_size} ranks")
    if new_tokens < 3:  # one from the prompt, and two steps to take the time between
        raise ValueError(f"--profile needs --new-tokens >= 3, got {new_tokens}")
    options = {"stop_token_ids": [], "max_batch": len(prompts)}
    engine.generate(prompts, 4, **options)  # captures the graph
    kernels = engine.core.decode_kernels()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.generate(prompts, new_tokens, **options)
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        and not event.name.startswith(("Memcpy", "Memset"))
    )
    steps = new_tokens - 1  # what lies before them belongs to the prompt
    last = [(start, end) for start, end, _ in events[-steps * len(kernels) :]]
    names = [name for _, _, name in events[-steps * len(kernels) :]]
    if not kernels or len(last) < steps * len(kernels) or names != names[: len(kernels)] * steps:
        raise ValueError(
            f"the profiler must see the same {len(kernels)} kernels in each of {steps} steps, got "
            f"{len(events)} kernels in all, others or in another order"
        )
    sums: dict[str, KernelTime] = {}
    for i, (what, _, _, size) in enumerate(kernels):
        own = [last[step * len(kernels) + i] for step in range(1, steps)]
        before = [last[step * len(kernels) + i - 1] for step in range(1, steps)]
        added = statistics.median(
            end - max(previous, start) if i == 0 else end - previous
            for (start, end), (_, previous) in zip(own, before, strict=True)
        )
        busy = statistics.median(end - start for start, end in own)
        kind = sums.setdefault(what, KernelTime(what, 0, 0.0, 0.0, 0))
        kind.count += 1
        kind.microseconds += added
        kind.busy += busy
        kind.bytes += size
    ends = [last[(step + 1) * len(kernels) - 1][1] for step in range(steps)]
    step_time = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    return list(sums.values()), step_time


def table(kernels: list[KernelTime], step_time: float, bandwidth: float) -> str:
    """The kinds of kernels as a text table; bandwidth in TB/s."""
    lines = [
        f"{'kernel':34} {'count':>5} {'us/step':>9} {'share':>6} {'MB':>9} {'TB/s':>6} "
        f"{'of read':>8}"
    ]
    for kernel in sorted(kernels, key=lambda kernel: -kernel.microseconds):
        rate = kernel.terabytes_per_second
        lines.append(
            f"{kernel.what:34} {kernel.count:5} {kernel.microseconds:9.1f} "
            f"{kernel.microseconds / step_time:6.1%} {kernel.bytes / 1e6:9.2f} {rate:6.2f} "
            f"{rate / bandwidth:8.1%}"
        )
    counted = sum(kernel.microseconds for kernel in kernels)
    lines.append(f"{'between steps (tokens)':34} {'':5} {step_time - counted:9.1f}")
    lines.append(f"{'step':34} {'':5} {step_time:9.1f}")
    lines.append(f"read bandwidth of this GPU: {bandwidth:.2f} TB/s")
    return "\n".join(lines)
