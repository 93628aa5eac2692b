"""Exports small models whose weights were rounded to a grid, without training them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moq.export import export_checkpoint
from moq.input_grid import InputGrid, is_asymmetric, static_grid
from moq.quantized_parameter import QuantizedParameter

# Grids by name: keyword arguments of QuantizedParameter, chosen per parameter name.
GRIDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "8 bits per channel": lambda name: {"num_bits": 8},
    "8 bits per tensor": lambda name: {"num_bits": 8, "granularity": "per_tensor"},
    "4 bits per group": lambda name: {
        "num_bits": 4,
        "granularity": "per_group",
        "group_size": 12,
    },
    "2 bits per group": lambda name: {
        "num_bits": 2,
        "granularity": "per_group",
        "group_size": 12,
    },
    "6 bits in 8-bit codes": lambda name: {"num_bits": 6},
    "8 bits asymmetric": lambda name: {"num_bits": 8, "mode": "asymmetric"},
    "4 bits asymmetric per group": lambda name: {
        "num_bits": 4,
        "mode": "asymmetric",
        "granularity": "per_group",
        "group_size": 12,
    },
    "mixed": lambda name: {"num_bits": 4 if ".1." in name else 12 if "down" in name else 8},
}


@torch.no_grad()
def export(
    model: PreTrainedModel,
    directory: Path,
    grid: str,
    activations: str | None = None,
    input_grids: dict[str, InputGrid] | None = None,
) -> PreTrainedModel:
    """Rounds the layers' matrices of `model` to a grid, in place, and exports it.

    Static activations have `input_grids`, by the name of the module.
    """
    quantized = []
    for name, parameter in model.named_parameters():
        in_layer = any(part in name for part in (".h.", ".layers.", ".layer."))
        if parameter.dim() != 2 or not in_layer:
            continue
        options = GRIDS[grid](name)
        inputs = InputGrid(activations) if activations is not None else None
        if input_grids is not None:
            inputs = input_grids[name.removesuffix(".weight")]
        transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        master = parameter.detach().clone()
        num_bits = options["num_bits"]
        simulated = torch.ops.moq.fake_quantize(
            master,
            num_bits,
            **{key: value for key, value in options.items() if key != "num_bits"},
            transposed=transposed,
        )
        parameter.copy_(simulated)
        quantized.append(
            QuantizedParameter(
                name,
                master,
                simulated,
                transposed=transposed,
                activations=activations,
                input_scale=inputs.scale if inputs else None,
                input_zero_point=inputs.zero_point if inputs else None,
                **options,
            )
        )
    assert quantized
    export_checkpoint(directory, model, quantized)
    return model


@torch.no_grad()
def static_input_grids(model: PreTrainedModel, row: list[int], kind: str) -> dict[str, InputGrid]:
    """Grids for the inputs of the layers' projections that clip the largest of a sequence."""
    grids: dict[str, InputGrid] = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            lowest, highest = inputs[0].aminmax()
            extent = torch.stack([-lowest, highest]).clamp(min=0) * 0.7
            extent = extent if is_asymmetric(kind) else extent.amax().expand(2)
            scale, zero_point = static_grid(extent, kind, torch.float32)
            offset = None if zero_point is None else int(zero_point)
            grids[name] = InputGrid(kind, scale.item(), offset)

        return hook

    hooks = [layer.register_forward_pre_hook(measure(name)) for name, layer in _projections(model)]
    model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return grids


def round_inputs(model: PreTrainedModel, grids: dict[str, InputGrid]) -> None:
    """Makes the projections see their inputs as training with INT8 activations shows them."""

    def rounded(grid: InputGrid) -> Callable[..., tuple[torch.Tensor]]:
        return lambda module, inputs: (grid.rounded(inputs[0]),)

    for name, layer in _projections(model):
        layer.register_forward_pre_hook(rounded(grids[name]))


def _projections(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights `export` rounds."""
    for name, module in model.named_modules():
        in_layer = any(part in name for part in (".h.", ".layers.", ".layer."))
        if in_layer and isinstance(getattr(module, "weight", None), nn.Parameter):
            if module.weight.dim() == 2:
                yield name, module
