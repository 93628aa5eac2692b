"""From a model to the tensors of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch.nn.utils.parametrize import is_parametrized

from moq import _C
from moq.input_grid import InputGrid
from moq.layout import DENSE, INTEGER, PACKED, StoredWeight, quantization_config, storage_bits
from moq.progress import track
from moq.quantized_parameter import QuantizedParameter
from moq.rules import plain_name


class ExportedModel:
    """A model's tensors under the names that a checkpoint gives them.

    Attributes:
        state: the model's state dict.
        aliases: name of each tied parameter -> the name that is stored.
        quantized: stored name -> quantized parameter.
        products: stored name -> scale * (code - zero_point) in float32, of weights that a 16-bit
            dtype rounds; filled by `convert`.
    """

    def __init__(self, model: torch.nn.Module, quantized: Sequence[QuantizedParameter]) -> None:
        """Matches the quantized parameters with the model.

        Raises:
            ValueError: naming a parameter that is not the model's, is given twice, or differs from
                the others in dtype.
        """
        self.model = model
        self.products: dict[str, torch.Tensor] = {}
        # A wrapper and what it wraps have one name then; the inner module comes last and stays.
        self.modules = {plain_name(name): module for name, module in model.named_modules()}
        self.state = {
            plain_name(name): value.detach()
            for name, value in model.state_dict().items()
            if ".parametrizations." not in f".{plain_name(name)}"  # learned scales
        }
        self.aliases = self._find_aliases()
        self.quantized = self._by_name(quantized)
        # Where the forward pass simulates, the parameters are the masters.
        for name, parameter in self.quantized.items():
            self.state[name] = parameter.simulated.detach()
        for alias, name in self.aliases.items():
            self.state[alias] = self.state[name]
        dtypes = {parameter.simulated.dtype for parameter in self.quantized.values()}
        if len(dtypes) > 1:
            raise ValueError(
                "export: quantized parameters must have one dtype, because readers load all scales "
                f"in it, got {sorted(str(dtype) for dtype in dtypes)}"
            )

    def _find_aliases(self) -> dict[str, str]:
        """Name of each tied parameter -> the name that is stored."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        first: dict[tuple[Any, ...], str] = {}
        names = sorted(self.state, key=lambda name: name in tied)  # stable: tied names come last
        aliases = {}
        for name in names:
            value = self.state[name]
            if value.numel() == 0:
                continue
            storage = (value.data_ptr(), value.dtype, value.shape, value.stride())
            stored = first.setdefault(storage, name)
            if stored != name:
                aliases[name] = stored
        return aliases

    def _by_name(self, quantized: Sequence[QuantizedParameter]) -> dict[str, QuantizedParameter]:
        by_name: dict[str, QuantizedParameter] = {}
        for parameter in quantized:
            name = self.aliases.get(parameter.name, parameter.name)
            if name not in self.state:
                raise ValueError(f"{parameter.name}: expected a parameter of the model, got none")
            if not name.endswith(".weight"):
                raise ValueError(
                    f"{parameter.name}: expected the weight of a module: a checkpoint stores no "
                    "other parameter as codes"
                )
            if name in by_name:
                raise ValueError(f"{parameter.name}: expected every parameter once, got it again")
            if self.state[name].shape != parameter.simulated.shape:
                raise ValueError(
                    f"{parameter.name}: simulated must have the parameter's shape "
                    f"{list(self.state[name].shape)}, got {list(parameter.simulated.shape)}"
                )
            by_name[name] = parameter
        return by_name

    def convert(self) -> tuple[dict[str, torch.Tensor], dict[str, StoredWeight]]:
        """Returns the tensors to store, and how each quantized weight lies among them."""
        tensors: dict[str, torch.Tensor] = {}
        weights: dict[str, StoredWeight] = {}
        stored = [name for name in self.state if name not in self.aliases]
        for name in track(stored, "converting"):
            parameter = self.quantized.get(name)
            if parameter is None:
                refuse_nonfinite(name, self.state[name])
                tensors[name] = self.state[name].cpu()
            else:
                module = self.modules[name.rpartition(".")[0]]
                weights[name], converted, products = _convert_weight(
                    name, parameter, _class_name(module)
                )
                tensors |= converted
                if products is not None:
                    self.products[name] = products
        return tensors, weights

    def exact_state(self) -> dict[str, torch.Tensor]:
        """Returns the state of a model that multiplies codes by scales without rounding."""
        state = self.state | self.products
        return state | {alias: state[name] for alias, name in self.aliases.items()}

    def input_grids(self, weights: Mapping[str, StoredWeight]) -> dict[str, InputGrid]:
        """Returns the layers that read INT8 inputs -> their grid."""
        grids = {}
        for name, weight in weights.items():
            if weight.activations is not None:
                p = self.quantized[name]
                grids[name] = InputGrid(weight.activations, p.input_scale, p.input_zero_point)
        names = {name: name for name in grids} | {
            alias: name for alias, name in self.aliases.items() if name in grids
        }
        return {alias.rpartition(".")[0]: grids[name] for alias, name in names.items()}

    def config(self, weights: Mapping[str, StoredWeight]) -> dict[str, Any]:
        """Returns config.json: the model's own, its true dtype, and where its integers are."""
        config: dict[str, Any] = {}
        if isinstance(self.model, transformers.PreTrainedModel):
            config = json.loads(self.model.config.to_json_string())
        config["architectures"] = [type(self.model).__name__]
        config.pop("quantization_config", None)
        dtypes = [p.simulated.dtype for p in self.quantized.values()]
        dtypes += [value.dtype for value in self.state.values() if value.is_floating_point()]
        if dtypes:
            config["dtype"] = str(dtypes[0]).removeprefix("torch.")
        stored = {weight.module for weight in weights.values() if weight.format != DENSE}
        if stored:
            shared = {self.aliases[name].rpartition(".")[0] for name in self.aliases}
            config["quantization_config"] = quantization_config(
                weights.values(), self._matrix_modules() - stored, shared
            )
        # In one order, whatever the order in which transformers read or made its config.
        return dict(sorted(config.items()))

    def _matrix_modules(self) -> set[str]:
        """Names of the modules that own a weight matrix, stored or tied."""
        return {
            name.rpartition(".")[0]
            for name, value in self.state.items()
            if name.endswith(".weight") and value.dim() == 2
        }


def _class_name(module: torch.nn.Module) -> str:
    """Class of a module, not the one that torch derives from it for a parametrization."""
    kind = type(module)
    return kind.__bases__[0].__name__ if is_parametrized(module) else kind.__name__


def refuse_nonfinite(name: str, value: torch.Tensor) -> None:
    """Refuses a tensor that no training could go on from.

    Raises:
        moq.Error: naming it.
    """
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise _C.Error(f"{name}: expected finite values, got a NaN or an infinity")


def _convert_weight(
    name: str, parameter: QuantizedParameter, module_class: str
) -> tuple[StoredWeight, dict[str, torch.Tensor], torch.Tensor | None]:
    """One weight matrix as a checkpoint stores it, and ExportedModel.products of it."""
    module = name.rpartition(".")[0]
    dtype = parameter.simulated.dtype
    dense = parameter.num_bits > 8
    weight_format = DENSE if dense else INTEGER if parameter.activations else PACKED
    master, simulated = parameter.master.detach().cpu(), parameter.simulated.detach().cpu()
    tensors: dict[str, torch.Tensor] = {}
    products = None
    if dense:
        for which in (master, simulated):
            refuse_nonfinite(name, which)
        norm = float(torch.linalg.vector_norm(master.double()))
        difference = float(torch.linalg.vector_norm(master.double() - simulated.double()))
        error = difference / norm if norm > 0 else 0.0
        tensors[name] = simulated
    else:
        codes, scales, zero_points, error = _C.recover_codes(
            name,
            master,
            simulated,
            num_bits=parameter.num_bits,
            mode=parameter.mode,
            granularity=parameter.granularity,
            group_size=parameter.group_size,
            transposed=parameter.transposed,
            scale_dtype=parameter.scale_dtype or dtype,
            scale_rule="given" if parameter.scale == "learned" else parameter.scale,
            absmax=None if parameter.absmax is None else parameter.absmax.detach().cpu(),
        )
        tensors[f"{name}_scale"] = scales
        if dtype != torch.float32:
            products = _products(codes, scales, zero_points, parameter.transposed)
        if weight_format == INTEGER:
            tensors[name] = codes
            if parameter.input_scale is not None:
                tensors[f"{module}.input_scale"] = torch.tensor(
                    [parameter.input_scale], dtype=parameter.scale_dtype or dtype
                )
            if parameter.input_zero_point is not None:
                tensors[f"{module}.input_zero_point"] = torch.tensor(
                    [parameter.input_zero_point], dtype=torch.int8
                )
            if zero_points is not None:
                tensors[f"{name}_zero_point"] = zero_points
        else:
            stored_bits = storage_bits(parameter.num_bits)
            tensors[f"{name}_packed"] = _C.pack_codes(codes, stored_bits)
            tensors[f"{name}_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
            if zero_points is not None:  # packed down the rows
                packed = _C.pack_codes(zero_points.t(), stored_bits)
                tensors[f"{name}_zero_point"] = packed.t().contiguous()
    stored = dict(
        module=module,
        module_class=module_class,
        format=weight_format,
        trained_bits=parameter.num_bits,
        stored_bits=None if dense else 8 if weight_format == INTEGER else stored_bits,
        mode=parameter.mode,
        granularity=parameter.granularity,
        group_size=parameter.group_size
        if parameter.granularity in ("per_group", "per_rows")
        else 0,
        shape=[parameter.out_features, parameter.in_features],
        transposed=parameter.transposed,
        scale_dtype=str(parameter.scale_dtype or dtype).removeprefix("torch."),
        activations=None if dense else parameter.activations,
        quantization_error=error,
    )
    return StoredWeight.from_dict(stored, name), tensors, products


def _products(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """Multiplies scale * (code - zero_point) in float32, as the module stores its weight.

    Args:
        codes: [out, in].
        scales: [out, groups].
        zero_points: as scales; None: zeros.
        transposed: the module's weight is [in, out].
    """
    size = codes.shape[1] // max(1, scales.shape[1])

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.float().repeat_interleave(size, dim=1)

    offsets = codes.float() if zero_points is None else codes.float() - spread(zero_points)
    products = spread(scales) * offsets
    return products.t() if transposed else products
