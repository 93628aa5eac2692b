"""What moq adds to a training step.

Models of the same weights take turns on the same batch, so that load of the machine hits all alike:

  moq             MoQOptimizer around the optimizer, all linear weights falling
  moq.AdamW       the same around moq.AdamW, which casts no gradients (GPU)
  plain           the optimizer with the same master precision: what moq's masters cost anyway
  pure            the optimizer on the model's parameters (half-precision models only)
  eager modules   fake-quantize modules in the forward pass, as eager QAT has them (CPU)
  logged          moq that prints its drops and measures for TensorBoard and CSV at every step; by
                  default it measures at every tenth (CPU)

CPU: BERT-base's shape, FP32, batch 8 x 128, AdamW; wall time is what counts, and processor time,
which other processes disturb less, tells what a busy machine's wall time hides. Both are split into
the passes, which do the same work in all models, and the update, which is where moq works: other
processes disturb the passes by more than what moq adds, so that the update tells most about it.
GPU: GPT-2 medium's
shape (355M), BF16, batch 8 x 512, fused AdamW, eager and compiled; time between CUDA events around
a run of steps, and the memory of each.
"""

import argparse
import contextlib
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import gpu
import torch
from report import Row, machine, print_rows
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import moq
from moq.loggers import CsvLogger, TensorBoardLogger

NUM_LABELS = 26
MINILM = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
}
ENCODERS = {"bert-base": ({}, (8, 128)), "minilm-l6": (MINILM, (32, 32))}
DECODER = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
DECODER_BATCH = (8, 512)
CPU_CASES = ["nearest", "stochastic", "logged", "eager modules"]
GPU_MODES = ["eager", "compiled"]
ROUNDINGS = ["nearest", "stochastic"]
INNER = {"moq": torch.optim.AdamW, "moq.AdamW": moq.AdamW}  # of the competitors that are moq's
LEARNING_RATE = 2e-5
RUN = 4  # steps between two CUDA events

PARTS = ("step", "passes", "update")  # what is timed (CPU): the whole, and what it consists of

Step = Callable[[], None]
Parts = list[tuple[float, float]]  # wall and processor seconds of each of PARTS


def encoder(name: str) -> BertForSequenceClassification:
    """An encoder with the same random weights each time."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**ENCODERS[name][0], num_labels=NUM_LABELS))


def decoder() -> GPT2LMHeadModel:
    """A decoder with the same random weights each time, BF16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT2LMHeadModel(GPT2Config(**DECODER, use_cache=False))
    return model.to(torch.bfloat16)


def wrap(
    model: nn.Module,
    rounding: str,
    steps: int,
    logs: str | None = None,
    inner: type[torch.optim.AdamW] = torch.optim.AdamW,
    **adamw: bool,
) -> moq.MoQOptimizer:
    """The wrapper, 16 to 8 bits falling throughout; with a folder for logs it tells all it can."""
    loggers = [] if logs is None else [TensorBoardLogger(logs), CsvLogger(f"{logs}/moq.csv")]
    return moq.MoQOptimizer(
        inner(model.parameters(), lr=LEARNING_RATE, **adamw),
        model,
        {"rounding": rounding, "schedule": {"finish_at": 1.0}},
        total_steps=steps,
        verbose=logs is not None,
        loggers=loggers,
        log_every=1,
    )


class FakeQuantizedWeight(nn.Module):
    """8 bits per channel in the forward pass, by torch's operator."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the simulated weight."""
        scale = weight.detach().abs().amax(1) / 127
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -127, 127)


def with_fake_quantize_modules(model: nn.Module) -> nn.Module:
    """The model with every linear weight parametrized but the head's."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "classifier":
            parametrize.register_parametrization(module, "weight", FakeQuantizedWeight())
    return model


class MasterAdamW:
    """Fused AdamW over float32 masters of some parameters, as mixed-precision training has them."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        """Makes masters of the parameters named; the others are updated as they are."""
        named = dict(model.named_parameters())
        self.parameters = [p for name, p in named.items() if name in names]
        self.masters = [p.detach().float() for p in self.parameters]
        self.others = [p for name, p in named.items() if name not in names]
        trained = self.masters + self.others
        self.adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Casts the gradients, steps, and casts the masters back."""
        gradients = [p.grad for p in self.parameters]
        casts = [torch.empty_like(g, dtype=torch.float32) for g in gradients]
        torch._foreach_copy_(casts, gradients)
        for master, cast in zip(self.masters, casts, strict=True):
            master.grad = cast
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        torch._foreach_copy_(self.parameters, self.masters)

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for p in self.parameters + self.others:
            p.grad = None


def parts_of(
    called: nn.Module, optimizer: object, batch: dict[str, torch.Tensor]
) -> tuple[Step, Step]:
    """One training step in two parts: the passes, forward and backward, and the update."""

    def passes() -> None:
        called(**batch).loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return passes, update


def step_of(called: nn.Module, optimizer: object, batch: dict[str, torch.Tensor]) -> Step:
    """One training step."""
    passes, update = parts_of(called, optimizer, batch)

    def step() -> None:
        passes()
        update()

    return step


# ----------------------------------------------------------------------------------------- CPU


def cpu_rows(name: str, cases: list[str], steps: int) -> Iterator[tuple[str, Row]]:
    """Rows of one encoder, with the table each belongs to."""
    config, (size, length) = encoder(name).config, ENCODERS[name][1]
    torch.manual_seed(1)
    batch = {
        "input_ids": torch.randint(config.vocab_size, (size, length)),
        "labels": torch.randint(NUM_LABELS, (size,)),
    }
    for rounding in cases:
        models = {"plain": encoder(name), rounding: encoder(name)}
        plain, other = models.values()
        optimizers = {"plain": torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE)}
        if rounding == "eager modules":
            with_fake_quantize_modules(other)
            optimizers[rounding] = torch.optim.AdamW(other.parameters(), lr=LEARNING_RATE)
        elif rounding == "logged":
            with contextlib.redirect_stdout(sys.stderr):  # standard output is the result's
                optimizers[rounding] = wrap(other, "nearest", steps + 1, tempfile.mkdtemp())
        else:
            optimizers[rounding] = wrap(other, rounding, steps + 1)
        calls = {key: parts_of(models[key], optimizers[key], batch) for key in models}
        with contextlib.redirect_stdout(sys.stderr):
            times = clocked(calls, steps)
        case = f"{name} batch {size} x {length}, {rounding}"
        table = "eager fake-quantize modules" if rounding == "eager modules" else "training step"
        for row in rows_of_times(case, times[rounding], times["plain"]):
            yield table, row
        gpu.progress(case)
        del models, optimizers, calls, plain, other
        gc.collect()


def rows_of_times(case: str, own: list[Parts], plain: list[Parts]) -> Iterator[Row]:
    """Rows of the best and the median: of all parts by wall time, of the step by processor time."""
    for clock, kind in enumerate(("wall", "processor")):
        for statistic, label in ((min, "best"), (statistics.median, "median")):
            times = [
                [1e3 * statistic([turn[part][clock] for turn in turns]) for part in range(3)]
                for turns in (own, plain)
            ]
            for part, name in enumerate(PARTS if kind == "wall" else PARTS[:1]):
                values = times[0][part], times[1][part]
                added = (values[0] - values[1]) / times[1][0]
                note = f"({values[0] / values[1]:.3f} times; {added:+.1%} of a plain step)"
                yield Row(f"{case}, {kind} time of the {name}, {label}", *values, "ms", note)
        pairs = zip(own, plain, strict=True)
        turns = statistics.median(mine[0][clock] / other[0][clock] for mine, other in pairs)
        gpu.progress(f"{case}, {kind} time of the step: median of the turns' ratios {turns:.3f}")


def clocked(calls: dict[str, tuple[Step, Step]], steps: int) -> dict[str, list[Parts]]:
    """Wall and processor seconds of PARTS in every step; the first of each is not counted."""
    times: dict[str, list[Parts]] = {name: [] for name in calls}
    for turn in range(steps + 1):
        order = list(calls) if turn % 2 else list(calls)[::-1]
        for name in order:
            marks = [(time.perf_counter(), time.process_time())]
            for part in calls[name]:
                part()
                marks.append((time.perf_counter(), time.process_time()))
            if turn:
                ends = ((0, 2), (0, 1), (1, 2))
                times[name].append(
                    [(marks[j][0] - marks[i][0], marks[j][1] - marks[i][1]) for i, j in ends]
                )
    return times


# ----------------------------------------------------------------------------------------- GPU


def gpu_rows(turns: int, compiled: bool, rounding: str) -> Iterator[Row]:
    """Rows of the decoder against the plain step of the same precision and against pure BF16."""
    torch.manual_seed(1)
    tokens = torch.randint(GPT2Config().vocab_size, DECODER_BATCH, device="cuda")
    batch = {"input_ids": tokens, "labels": tokens}
    calls: dict[str, Step] = {}
    memory: dict[str, tuple[int, int]] = {}
    names: set[str] = set()
    unit = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    unit @ unit  # the workspace of products is nobody's
    for name in (*INNER, "plain", "pure"):
        held = torch.cuda.memory_allocated()
        model = decoder()
        if name in INNER:
            steps = 4 + RUN * (turns + 1)
            optimizer = wrap(model, rounding, steps, inner=INNER[name], fused=True)
            names = set(optimizer.num_bits)
        elif name == "plain":
            optimizer = MasterAdamW(model, names)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        called = torch.compile(model) if compiled else model
        calls[name] = step_of(called, optimizer, batch)
        for _ in range(3):
            calls[name]()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
        calls[name]()
        memory[name] = (at_rest - held, torch.cuda.max_memory_allocated() - at_rest)
        gpu.progress(f"{name}, {'compiled' if compiled else 'eager'}: ready")
    seconds = timed(calls, turns)
    case = f"355M BF16 batch 8 x 512, {'compiled' if compiled else 'eager'}, {rounding}"
    numel = sum(p.numel() for n, p in model.named_parameters() if n in names)
    peers = {"plain": "plain step, same masters", "pure": "pure BF16 step"}
    for own, (peer, label) in itertools.product(INNER, peers.items()):
        times = [1e3 * statistics.median(seconds[name]) for name in (own, peer)]
        pairs = zip(seconds[own], seconds[peer], strict=True)
        ratios = statistics.quantiles([mine / other for mine, other in pairs], n=4)
        rest, peak = ((memory[own][i] - memory[peer][i]) / 2**20 for i in range(2))
        note = (
            f"({ratios[1]:.3f} times, half of the turns {ratios[0]:.3f} to {ratios[2]:.3f}; "
            f"memory {rest:+.0f} MiB kept, {peak:+.0f} MiB in a step; "
            f"the masters are {numel / 2**18:.0f} MiB)"
        )
        yield Row(f"{case}, {own}, {label}", *times, "ms", note)


def timed(calls: dict[str, Step], turns: int) -> dict[str, list[float]]:
    """Seconds of a step of each competitor in every turn, host included.

    A GPU's clocks change with its load and temperature within seconds: a turn is short, and who
    comes first changes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(RUN):
                calls[name]()
            end.record()
            end.synchronize()
            if turn:
                seconds[name].append(start.elapsed_time(end) / 1e3 / RUN)
    return seconds


def main() -> int:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(ENCODERS), default=["bert-base"])
    parser.add_argument("--cases", nargs="+", choices=CPU_CASES, default=CPU_CASES, help="(CPU)")
    parser.add_argument("--modes", nargs="+", choices=GPU_MODES, default=GPU_MODES, help="(GPU)")
    parser.add_argument(
        "--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS, help="(GPU)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (CPU)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each competitor (CPU)")
    gpu.arguments(parser)
    options = parser.parse_args()
    if options.device == "cuda":
        gpu.require()
        facts = gpu.facts()
        rows = []
        for mode in options.modes:
            for rounding in options.roundings:
                measured = gpu_rows(options.turns, mode == "compiled", rounding)
                if options.json:  # a run that is stopped later has told these
                    print_rows("training step", "peer", measured, True, facts)
                rows += measured
                gc.collect()
                torch.cuda.empty_cache()
        if not options.json:
            print_rows("training step", "peer", rows, False, facts)
        return 0
    torch.set_num_threads(options.threads)
    facts = {"machine": f"{machine()}, {options.threads} threads"}
    tables: dict[str, list[Row]] = {}
    for name in options.models:
        for table, row in cpu_rows(name, options.cases, options.steps):
            tables.setdefault(table, []).append(row)
    for table, rows in tables.items():
        print_rows(table, "plain step", rows, options.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
