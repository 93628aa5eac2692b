"""One cell of accuracy.py: a model that one method made, at one width and seed, and its score."""

import gc
import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accuracy_inputs import once
from accuracy_table import EXPECTED
from accuracy_tasks import Settings, Task
from rank_correlation import rank_correlation
from torch import nn

import moq
from moq.config import BLOCK_PATTERN
from moq.sensitivity import Sensitivity
from moq.target_bits import Weight, bytes_beside

MODELS = {"minilm": "MiniLM-L6", "smollm2": "SmolLM2-135M"}
DATA = {"wordnet": "WordNet-26", "rotten": "Rotten Tomatoes", "sotu": "State of the Union"}
FULL_BITS = 32
START_BITS = 16
FINISH_AT = 0.6
WIDTHS = (4, 8)  # offered to a budget
Weighing = Literal["mean eigenvalue", "trace", "nothing"]  # of rounding errors
TRAINING = ("first_steps", "steps", "batch_size", "learning_rate", "granularity")  # recorded
BLOCK_BITS = 4  # at which a block's own loss increase is measured
TOLERANCE = {"trace": 0.1, "eigenvalue": 0.05}


@dataclass(frozen=True)
class Cell:
    """What one result belongs to.

    Attributes:
        task: ``wordnet``, ``rotten`` or ``sotu``.
        method: One of METHODS.
        bits: Width of all quantized weights, or their mean under a budget; FULL_BITS: not rounded.
        seed: Of the training.
    """

    task: str
    method: str
    bits: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.method}/{self.bits:g}/seed{self.seed}"


@dataclass
class Outcome:
    """What a method made.

    Attributes:
        model: Its weights are on their grids.
        weights: The quantized parameters.
        widths: Bits of each of them, by name; none for full precision.
        extra: More for the result.
    """

    model: nn.Module
    weights: Sequence[Weight]
    widths: Mapping[str, int]
    extra: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------- shared by the methods


def config_of(task: Task, bits: int, pattern: str, **more: Any) -> dict[str, Any]:
    """The configuration of a training that ends at `bits`."""
    grid: dict[str, Any] = {"granularity": task.settings.granularity}
    if task.settings.group_size:
        grid["group_size"] = task.settings.group_size
    return (
        grid
        | {
            "start_bits": START_BITS,
            "target_bits": bits,
            "block_pattern": pattern,
            "schedule": {"finish_at": FINISH_AT},
            "seed": task.seed,
        }
        | more
    )


def wrap(
    task: Task, model: nn.Module, bits: int, pattern: str = BLOCK_PATTERN, **more: Any
) -> moq.MoQOptimizer:
    """The optimizer of a training that ends at `bits`."""
    return moq.MoQOptimizer(
        task.optimizer(model),
        model,
        config_of(task, bits, pattern, **more),
        total_steps=task.settings.steps,
        verbose=False,
    )


def probe(
    task: Task, optimizer: moq.MoQOptimizer, measure: str, *, fused: bool, first: bool = True
) -> Sensitivity:
    """Measures the blocks, unless a cell has done so already, and plans by it."""
    found: list[Sensitivity] = []

    def write(path: Path) -> None:
        model = optimizer.model
        found.append(
            optimizer.probe(
                lambda batch: model(**batch).loss,
                task.probe_batches(),
                measure=measure,
                form="exact",
                max_seconds=None,  # every machine makes the same products
                max_products=task.settings.products[measure == "eigenvalue"],
                tolerance=TOLERANCE[measure],
                max_cost=None,  # what it finds is compared, not what it costs
            )
        )
        path.write_text(json.dumps(asdict(found[0])))

    name = f"-{'first' if first else 'last'}-{'fused' if fused else 'layers'}-{measure}.json"
    path = once(task.stem.with_name(task.stem.name + name), write)
    if not found:
        stored = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(path.read_text()).items()
        }
        found.append(Sensitivity(**stored))
        optimizer.apply_sensitivity(found[0])
    return found[0]


def weights_of(optimizer: moq.MoQOptimizer, scale: str = "absmax") -> list[Weight]:
    """The quantized parameters with their grids."""
    return [
        Weight(
            name=quantized.name,
            master=quantized.master.detach(),
            dtype=torch.float32,
            mode=quantized.mode,
            granularity=quantized.granularity,
            group_size=quantized.group_size,
            transposed=quantized.transposed,
            scale=scale,
            activations=None,
        )
        for quantized in optimizer.quantized_parameters()
    ]


@torch.no_grad()
def round_weights(model: nn.Module, weights: Sequence[Weight], widths: Mapping[str, int]) -> None:
    """Puts the weights that `widths` names on their grids, as MoQOptimizer would."""
    parameters = dict(model.named_parameters())
    for weight in weights:
        if weight.name in widths:
            parameters[weight.name].copy_(weight.simulated(widths[weight.name]))


@torch.no_grad()
def show_masters(model: nn.Module, weights: Sequence[Weight]) -> None:
    """Puts the full-precision values into the model."""
    parameters = dict(model.named_parameters())
    for weight in weights:
        parameters[weight.name].copy_(weight.master)


def found_block(pattern: str, parameter: str) -> str:
    """The block that a parameter is in, as MoQConfig.block_pattern names it."""
    module = parameter.removesuffix(".weight")
    found = re.search(pattern, module)
    return found.group() if found else module


def cost_of(found: Sensitivity) -> dict[str, float]:
    """What a measurement took."""
    return {"probe_seconds": round(found.seconds, 3), "products": found.products}


def chosen_widths(
    optimizer: moq.MoQOptimizer, found: Sensitivity, bits: float, by: Weighing
) -> dict[str, int]:
    """Bits of each block under a budget, which the schedule follows from now on."""
    if by == "nothing":
        ones = (1.0,) * len(found.blocks)
        found = replace(found, values=ones, normalised=ones)
    choice = optimizer.choose_target_bits(
        mean_bits=bits,
        widths=WIDTHS,
        sensitivity=found,
        objective="mean_eigenvalue" if by == "mean eigenvalue" else "trace",
    )
    return choice.target_bits


def trained(
    model: nn.Module, optimizer: moq.MoQOptimizer, extra: dict[str, Any] | None = None
) -> Outcome:
    """What a training with moq made."""
    return Outcome(model, weights_of(optimizer), optimizer.num_bits, extra or {})


# --------------------------------------------------------------------------- methods


def fp32(task: Task, bits: float) -> Outcome:
    """Full precision to the end."""
    model = task.fine_tuned(first=False)
    weights = weights_of(wrap(task, model, START_BITS))
    show_masters(model, weights)
    return Outcome(model, weights, {})


def ptq(task: Task, bits: float, scale: str = "absmax") -> Outcome:
    """The FP32 model, rounded."""
    model = task.fine_tuned(first=False)
    weights = weights_of(wrap(task, model, int(bits)), scale)
    widths = {weight.name: int(bits) for weight in weights}
    round_weights(model, weights, widths)
    return Outcome(model, weights, widths)


def ptq_mse(task: Task, bits: float) -> Outcome:
    """The FP32 model, rounded with clipped scales of least squared error."""
    return ptq(task, bits, "mse")


def ptq_budget(task: Task, bits: float, by: Weighing = "mean eigenvalue") -> Outcome:
    """The FP32 model, rounded to the widths that a budget allows."""
    model = task.fine_tuned(first=False)
    optimizer = wrap(task, model, max(WIDTHS), task.settings.fused)
    found = probe(task, optimizer, "trace", fused=True, first=False)
    choice = chosen_widths(optimizer, found, bits, by)
    weights = weights_of(optimizer)
    widths = {
        weight.name: choice[found_block(task.settings.fused, weight.name)] for weight in weights
    }
    round_weights(model, weights, widths)
    return Outcome(model, weights, widths, cost_of(found) | {"choice": list(choice.values())})


def ptq_trace(task: Task, bits: float) -> Outcome:
    """As ptq_budget, rounding errors weighed with the trace itself."""
    return ptq_budget(task, bits, "trace")


def ptq_error(task: Task, bits: float) -> Outcome:
    """As ptq_budget, chosen by rounding errors alone."""
    return ptq_budget(task, bits, "nothing")


def qat(task: Task, bits: float) -> Outcome:
    """Trained at its last width from the first step."""
    model = task.fine_tuned(first=True)
    optimizer = wrap(task, model, int(bits), start_bits=int(bits))
    task.train(model, optimizer, first=False)
    return trained(model, optimizer)


def by_time(task: Task, bits: float) -> Outcome:
    """MoQ, all blocks at one pace."""
    model = task.fine_tuned(first=True)
    optimizer = wrap(task, model, int(bits))
    task.train(model, optimizer, first=False)
    return trained(model, optimizer)


def by_trace(task: Task, bits: float, measure: str = "trace") -> Outcome:
    """MoQ, each layer at the pace that its trace allows."""
    model = task.fine_tuned(first=True)
    optimizer = wrap(task, model, int(bits))
    found = probe(task, optimizer, measure, fused=False)
    task.train(model, optimizer, first=False)
    return trained(model, optimizer, cost_of(found))


def by_eigenvalue(task: Task, bits: float) -> Outcome:
    """MoQ, each layer at the pace that its top eigenvalue allows."""
    return by_trace(task, bits, "eigenvalue")


def by_shuffled_trace(task: Task, bits: float) -> Outcome:
    """The control of by_trace: the same paces, each given to a layer drawn at random."""
    model = task.fine_tuned(first=True)
    optimizer = wrap(task, model, int(bits))
    found = probe(task, optimizer, "trace", fused=False)
    order = random.Random(task.seed).sample(range(len(found.blocks)), len(found.blocks))
    optimizer.apply_sensitivity(
        replace(
            found,
            values=tuple(found.values[i] for i in order),
            normalised=tuple(found.normalised[i] for i in order),
        )
    )
    task.train(model, optimizer, first=False)
    return trained(model, optimizer, cost_of(found))


def budget(task: Task, bits: float, by: Weighing = "mean eigenvalue") -> Outcome:
    """MoQ, each fused block to the width, and at the pace, that its trace allows."""
    model = task.fine_tuned(first=True)
    optimizer = wrap(task, model, max(WIDTHS), task.settings.fused)
    found = probe(task, optimizer, "trace", fused=True)
    choice = chosen_widths(optimizer, found, bits, by)
    task.train(model, optimizer, first=False)
    return trained(model, optimizer, cost_of(found) | {"choice": list(choice.values())})


def budget_trace(task: Task, bits: float) -> Outcome:
    """As budget, rounding errors weighed with the trace itself."""
    return budget(task, bits, "trace")


def budget_error(task: Task, bits: float) -> Outcome:
    """As budget, the widths chosen by rounding errors alone."""
    return budget(task, bits, "nothing")


def block_losses(task: Task, bits: float) -> Outcome:
    """No training: what rounding one block alone does to the loss, beside what predicts it."""
    model = task.fine_tuned(first=True)
    extra: dict[str, Any] = {"blocks": {}}
    _, before = task.evaluate(model, some=True)
    for kind, pattern, measures in (
        ("layers", BLOCK_PATTERN, ("trace", "eigenvalue")),
        ("fused", task.settings.fused, ("trace",)),
    ):
        optimizer = wrap(task, model, BLOCK_BITS, pattern)
        found = {name: probe(task, optimizer, name, fused=kind == "fused") for name in measures}
        names = found["trace"].blocks
        weights = weights_of(optimizer)
        show_masters(model, weights)
        errors, increases, sizes = [], [], []
        for name in names:
            own = [w for w in weights if found_block(pattern, w.name) == name]
            round_weights(model, own, {w.name: BLOCK_BITS for w in own})
            increases.append(task.evaluate(model, some=True)[1] - before)
            show_masters(model, own)
            errors.append(math.fsum(w.squared_error(BLOCK_BITS) for w in own))
            sizes.append(sum(w.master.numel() for w in own))
        predictors = {name: [abs(v) for v in f.values] for name, f in found.items()}
        predictors["squared error"] = errors
        for measure in measures:
            predictors[f"{measure} * squared error"] = [
                abs(value) * error
                for value, error in zip(found[measure].values, errors, strict=True)
            ]
        predictors[EXPECTED] = [
            0.5 * abs(value) / size * error
            for value, size, error in zip(found["trace"].values, sizes, errors, strict=True)
        ]
        extra["blocks"][kind] = {
            "names": list(names),
            "num_weights": sizes,
            "increase": increases,
            "predictors": predictors,
            "rank_correlation": {
                name: rank_correlation(values, increases) for name, values in predictors.items()
            },
        }
        del optimizer  # a model has one at a time
    return Outcome(model, [], {}, extra)


METHODS: dict[str, Callable[[Task, float], Outcome]] = {
    "fp32": fp32,
    "blocks": block_losses,
    "ptq": ptq,
    "ptq_mse": ptq_mse,
    "ptq_budget": ptq_budget,
    "ptq_trace": ptq_trace,
    "ptq_error": ptq_error,
    "qat": qat,
    "time": by_time,
    "trace": by_trace,
    "eigenvalue": by_eigenvalue,
    "shuffled": by_shuffled_trace,
    "budget": budget,
    "budget_trace": budget_trace,
    "budget_error": budget_error,
}


def run(cell: Cell, settings: Settings, folder: Path, work: Path, device: str) -> dict[str, Any]:
    """Makes the model of a cell, measures it, and returns the result."""
    started = time.perf_counter()
    gc.collect()  # what the process's last cell left on the device
    torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = False  # but for training
    task = Task(settings, cell.seed, folder, work, device)
    outcome = METHODS[cell.method](task, cell.bits)
    result: dict[str, Any] = {
        "model": MODELS[settings.model],
        "data": DATA[settings.data],
        **asdict(cell),
        "training": {name: getattr(settings, name) for name in TRAINING},
    }
    if cell.method != "blocks":
        score, loss = task.evaluate(outcome.model)
        result |= {
            "metric": "perplexity" if task.higher_is_worse else "accuracy",
            "score": score,
            "loss": loss,
            **sizes_of(outcome),
        }
    return result | outcome.extra | {"seconds": round(time.perf_counter() - started, 2)}


def sizes_of(outcome: Outcome) -> dict[str, float]:
    """Bytes of the quantized matrices in a checkpoint and of the whole model, and mean bits."""
    parameters = dict(outcome.model.named_parameters())
    total = own = bits = 0
    for weight in outcome.weights:
        elements = weight.master.numel()
        width = outcome.widths.get(weight.name, FULL_BITS)
        total += elements
        bits += width * elements
        own += FULL_BITS // 8 * elements if width == FULL_BITS else weight.bytes(width)
    beside = bytes_beside(outcome.model, [parameters[w.name] for w in outcome.weights])
    return {"bytes": own, "model_bytes": own + beside, "mean_bits": round(bits / total, 4)}
