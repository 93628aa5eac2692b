"""What the report tells of a run's weights: sizes, rounding errors, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from moq.budget import Budget
from moq.budget_command import choose_for_loaded, weight_of_run
from moq.input_grid import words_of
from moq.report_data import RunRecord
from moq.saved_run import SavedRun
from moq.target_bits import WIDTHS, TargetBits, bytes_beside


@dataclass
class LayerWeights:
    """The quantized weights of one block.

    Attributes:
        count: Elements.
        bytes: Of codes, scales and zero points in a checkpoint, at the width that they have.
        squared_error, squared_master: Sums over all elements; their ratio is the error's square.
        grids: Modes, granularities and widths of its weights, in words.
    """

    count: int = 0
    bytes: int = 0
    squared_error: float = 0.0
    squared_master: float = 0.0
    grids: dict[str, None] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Norm of simulated minus full-precision weights, over the norm of the latter."""
        return math.sqrt(self.squared_error / self.squared_master) if self.squared_master else 0.0


@dataclass(frozen=True)
class WidthTotal:
    """All weights of one width: matrices, elements, bytes in a checkpoint."""

    matrices: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class RunWeights:
    """Sizes of a run's model.

    Attributes:
        layers: By block.
        widths: By bits, fewest first.
        parameters: Elements of all tensors of the model, tied ones once.
        other_bytes: Of the tensors that are not quantized, as they are stored.
        int8_bytes: Of the quantized weights, were all of them stored in 8 bits.
    """

    layers: dict[str, LayerWeights]
    widths: dict[int, WidthTotal]
    parameters: int
    other_bytes: int
    int8_bytes: int

    @property
    def quantized_bytes(self) -> int:
        """Of the quantized weights, at the widths that they have."""
        return sum(total.bytes for total in self.widths.values())

    @property
    def error(self) -> float:
        """Quantization error of the whole model."""
        error = math.fsum(layer.squared_error for layer in self.layers.values())
        master = math.fsum(layer.squared_master for layer in self.layers.values())
        return math.sqrt(error / master) if master else 0.0


@torch.no_grad()
def weigh(run: SavedRun, blocks: Mapping[str, str]) -> RunWeights:
    """Measures every quantized weight of a run.

    Args:
        run: The run.
        blocks: Name of a weight -> its block.
    """
    layers: dict[str, LayerWeights] = {}
    widths: dict[int, list[int]] = {}
    int8_bytes = 0
    for p in run.quantized:
        stored, master = weight_of_run(p), p.master.float()
        layer = layers.setdefault(blocks.get(p.name, p.name), LayerWeights())
        layer.count += master.numel()
        layer.bytes += stored.bytes(p.num_bits)
        layer.squared_error += _squares(p.simulated.float() - master)
        layer.squared_master += _squares(master)
        words = f"{p.mode} {p.granularity.replace('_', ' ')}"
        layer.grids.setdefault(
            words + (f", {words_of(p.activations)} INT8 inputs" if p.activations else "")
        )
        total = widths.setdefault(p.num_bits, [0, 0, 0])
        for i, more in enumerate((1, master.numel(), stored.bytes(p.num_bits))):
            total[i] += more
        int8_bytes += stored.bytes(8)
    names = {p.name for p in run.quantized}
    quantized = [p for name, p in run.model.named_parameters() if name in names]
    return RunWeights(
        layers=layers,
        widths={bits: WidthTotal(*widths[bits]) for bits in sorted(widths)},
        parameters=sum(tensor.numel() for tensor in _tensors(run.model)),
        other_bytes=bytes_beside(run.model, quantized),
        int8_bytes=int8_bytes,
    )


def front_of(run: SavedRun, record: RunRecord) -> tuple[TargetBits, tuple[float, float] | None]:
    """Finds every choice of target widths that no other beats in mean bits and loss.

    Returns:
        The choice of all widths, which holds the front; and where the run's own targets lie, as
        (mean bits, loss).

    Raises:
        ValueError: if no trace was measured in the run.
    """
    targets = {layer.name: layer.target_bits for layer in record.layers}
    widths = tuple(sorted({*WIDTHS, *(bits for bits in targets.values() if bits > 1)}))
    choice = choose_for_loaded(run, Budget.of(mean_bits=16), widths=widths)
    cost, loss, weights = 0.0, 0.0, 0
    for block in choice.blocks:
        target = targets.get(block.name)
        if target not in block.widths:
            return choice, None
        cost += target * block.num_weights
        loss += block.losses[block.widths.index(target)]
        weights += block.num_weights
    return choice, (cost / weights, loss)


def _squares(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and stored buffers, tied ones once."""
    seen: set[int] = set()
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value
