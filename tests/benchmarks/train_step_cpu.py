"""What moq adds to a training step of an encoder on a CPU (train_step.py)."""

import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import gpu
import torch
from report import Row
from torch import nn
from torch.nn.utils import parametrize
from train_step_common import LEARNING_RATE, Step, parts_of, wrap
from transformers import BertConfig, BertForSequenceClassification

NUM_LABELS = 26
MINILM = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
}
ENCODERS = {"bert-base": ({}, (8, 128)), "minilm-l6": (MINILM, (32, 32))}
CASES = ["nearest", "stochastic", "logged", "eager modules"]
PARTS = ("step", "passes", "update")  # what is timed: the whole, and what it consists of

Parts = list[tuple[float, float]]  # wall and processor seconds of each of PARTS


def encoder(name: str) -> BertForSequenceClassification:
    """An encoder with the same random weights each time."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**ENCODERS[name][0], num_labels=NUM_LABELS))


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


def rows(name: str, cases: list[str], steps: int) -> Iterator[tuple[str, Row]]:
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
