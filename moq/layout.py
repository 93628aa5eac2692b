"""Which tensors a weight becomes in a checkpoint, and what config.json says about them.

The layout is compressed-tensors': ``pack-quantized`` for weight-only layers, ``int-quantized`` for
layers with INT8 activations. docs/FORMAT.md has the fields.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moq.input_grid import Kind, is_asymmetric, is_static
from moq.manifest import MANIFEST_NAME, FormatError
from moq.strict import Strict, require

PACKED = "pack-quantized"
INTEGER = "int-quantized"
DENSE = "dense"

# Version of compressed-tensors whose layout this is.
LAYOUT_VERSION = "0.20.0"


@dataclass(frozen=True, kw_only=True)
class StoredWeight(Strict):
    """How one weight matrix lies in the checkpoint; an entry of moq.json's ``weights``.

    Attributes:
        module: name of the module that owns the weight.
        module_class: class of that module: ``Linear``, ``Embedding``, ``Conv1D``.
        format: ``pack-quantized``, ``int-quantized``, or ``dense`` for a weight that was trained
            above 8 bits and is stored in the model's dtype.
        trained_bits: width of the grid that was trained.
        stored_bits: width of a stored code; None when dense.
        mode: ``symmetric``, ``asymmetric``, ``ternary`` or ``binary``.
        granularity: ``per_tensor``, ``per_channel``, ``per_group`` or ``per_rows``.
        group_size: input features (per_group) or output features (per_rows) per scale; otherwise 0.
        shape: [output features, input features].
        transposed: True if the module keeps its weight as [input features, output features]. Codes
            are stored [output features, input features] all the same.
        scale_dtype: dtype of the stored scales, as torch names it.
        activations: None, or INT8 activations: ``dynamic`` with one scale per token, ``static``
            with one scale; ``dynamic_asymmetric`` and ``static_asymmetric`` have zero points too.
        quantization_error: Frobenius norm of (master - simulated) over that of the master.
    """

    module: str
    module_class: str
    format: Literal["pack-quantized", "int-quantized", "dense"]
    trained_bits: int
    stored_bits: int | None
    mode: Literal["symmetric", "asymmetric", "ternary", "binary"]
    granularity: Literal["per_tensor", "per_channel", "per_group", "per_rows"]
    group_size: int
    shape: list[int]
    transposed: bool
    scale_dtype: Literal["float32", "float16", "bfloat16"]
    activations: Kind | None
    quantization_error: float

    def validate(self) -> None:
        """Refuses fields that contradict each other.

        Raises:
            ValueError: naming the field, what it must be and what it is.
        """
        dense = self.format == DENSE
        least, most = (9, 16) if dense else (1 if self.mode == "binary" else 2, 8)
        require(
            least <= self.trained_bits <= most,
            f"trained_bits must lie in [{least}, {most}] for {self.format}",
            self.trained_bits,
        )
        stored = None if dense else 8 if self.format == INTEGER else storage_bits(self.trained_bits)
        require(self.stored_bits == stored, f"stored_bits must be {stored}", self.stored_bits)
        require(
            len(self.shape) == 2 and min(self.shape) >= 0,
            "shape must be [output features, input features]",
            self.shape,
        )
        require(
            (self.format == INTEGER) == (self.activations is not None),
            f"format must be {INTEGER} when activations are INT8, and only then",
            self.format,
        )
        side = {"per_group": "input", "per_rows": "output"}.get(self.granularity)
        features = self.shape[0 if side == "output" else 1]
        require(
            features % self.group_size == 0
            if side and self.group_size > 0
            else not side and self.group_size == 0,
            f"group_size must divide {features} {side} features"
            if side
            else f"group_size must be 0 for {self.granularity}",
            self.group_size,
        )
        require(
            math.isfinite(self.quantization_error) and self.quantization_error >= 0,
            "quantization_error must be a finite number >= 0",
            self.quantization_error,
        )

    @property
    def symmetric(self) -> bool:
        """True if the grid has no zero point."""
        return self.mode != "asymmetric"

    @property
    def num_groups(self) -> int:
        """Scales per row. One that rows share is stored for each: every reader knows that form."""
        return self.shape[1] // self.group_size if self.granularity == "per_group" else 1

    @property
    def qmax(self) -> int:
        """Largest code of the trained grid."""
        return max(1, int(2 ** (self.trained_bits - 1)) - 1)

    @property
    def qmin(self) -> int:
        """Smallest code of the trained grid (symmetric grids are narrow)."""
        return -self.qmax if self.symmetric else -self.qmax - 1

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name -> (safetensors dtype, shape) of the tensors that hold the weight."""
        rows, columns = self.shape
        float_dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[self.scale_dtype]
        weight = f"{self.module}.weight"
        if self.format == DENSE:
            stored_shape = [columns, rows] if self.transposed else [rows, columns]
            return {weight: (float_dtype, stored_shape)}
        assert self.stored_bits is not None
        tensors = {f"{weight}_scale": (float_dtype, [rows, self.num_groups])}
        if self.format == INTEGER:
            tensors[weight] = ("I8", [rows, columns])
            assert self.activations is not None
            if is_static(self.activations):
                tensors[f"{self.module}.input_scale"] = (float_dtype, [1])
            if self.activations == "static_asymmetric":
                tensors[f"{self.module}.input_zero_point"] = ("I8", [1])
            if not self.symmetric:
                tensors[f"{weight}_zero_point"] = ("I8", [rows, self.num_groups])
        else:
            tensors[f"{weight}_packed"] = ("I32", [rows, words(columns, self.stored_bits)])
            tensors[f"{weight}_shape"] = ("I64", [2])
            if not self.symmetric:
                packed = [words(rows, self.stored_bits), self.num_groups]
                tensors[f"{weight}_zero_point"] = ("I32", packed)
        return tensors


def stored_weights(manifest: Mapping[str, Any], directory: Path) -> dict[str, StoredWeight]:
    """The entries of moq.json's ``weights``.

    Raises:
        FormatError: naming the entry and the field that is not as the format says.
    """
    try:
        return {
            name: StoredWeight.from_dict(entry, f"weights[{name!r}]")
            for name, entry in manifest["weights"].items()
        }
    except (TypeError, ValueError) as error:
        raise FormatError(f"{directory / MANIFEST_NAME}: {error}") from error


def words(count: int, num_bits: int) -> int:
    """32-bit words that `count` packed codes take."""
    return math.ceil(count * num_bits / 32)


def storage_bits(trained_bits: int) -> int:
    """Narrowest width that every reader unpacks alike: 3 bits go into 4, 5 to 7 into 8.

    Binary codes go into 2 bits: -1, 1, and 0 for a weight that is exactly 0.
    """
    return next(bits for bits in (2, 4, 8) if bits >= trained_bits)


def quantization_config(
    weights: Iterable[StoredWeight], ignore: Iterable[str], shared: Container[str] = ()
) -> dict[str, Any]:
    """config.json's ``quantization_config`` for these weights.

    Weights that differ in format, width, grid or activations go into groups of their own. The
    method is ``compressed-tensors`` where transformers can load every quantized module through
    that library, and ``moq`` otherwise: Conv1D modules, embeddings, and modules whose weight
    another one shares.

    Args:
        weights: the model's quantized weights; dense ones are passed over.
        ignore: names of the modules that keep a floating-point weight matrix.
        shared: names of the modules whose weight another module uses too.
    """
    quantized = [weight for weight in weights if weight.format != DENSE]
    groups: dict[tuple[Any, ...], list[StoredWeight]] = {}
    for weight in quantized:
        key = (
            weight.format,
            weight.stored_bits,
            weight.symmetric,
            weight.group_size if weight.granularity == "per_group" else 0,
            weight.activations,
        )
        groups.setdefault(key, []).append(weight)
    formats = {weight.format for weight in quantized}
    loadable = all(
        weight.module_class == "Linear" and weight.module not in shared for weight in quantized
    )
    return {
        "quant_method": "compressed-tensors" if loadable else "moq",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _config_group(group) for index, group in enumerate(groups.values())
        },
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": LAYOUT_VERSION,
    }


def _config_group(group: list[StoredWeight]) -> dict[str, Any]:
    first = group[0]
    grouped = first.granularity == "per_group"
    activations = None
    if first.activations is not None:
        dynamic = not is_static(first.activations)
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": not is_asymmetric(first.activations),
            "strategy": "token" if dynamic else "tensor",
            "dynamic": dynamic,
        }
    return {
        "targets": sorted(weight.module for weight in group),
        "format": first.format,
        "weights": {
            "num_bits": first.stored_bits,
            "type": "int",
            "symmetric": first.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": first.group_size if grouped else None,
            "dynamic": False,
        },
        "input_activations": activations,
        "output_activations": None,
    }
