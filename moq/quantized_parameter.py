"""What the trainer hands to the exporter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moq.input_grid import KINDS, QMAX, QMIN, is_static

MODES = ("symmetric", "asymmetric", "ternary", "binary")
GRANULARITIES = ("per_tensor", "per_channel", "per_group", "per_rows")
SCALES = ("absmax", "mse", "learned")
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedParameter:
    """One trained weight matrix: its two values and the grid that leads from one to the other.

    Attributes:
        name: full name of the parameter in the model, ``model.layers.0.mlp.up_proj.weight``.
        master: full-precision value that the optimizer updates, any floating-point dtype, in the
            shape of the parameter; the scales are computed from it.
        simulated: value on the integer grid that the model computes with, in the dtype and shape of
            the parameter.
        num_bits: width that was trained, 2 to 16, or 1 if binary. Above 8 bits the simulated value
            is exported as it is, without codes.
        mode: ``symmetric``, ``asymmetric``, ``ternary`` or ``binary``.
        granularity: which elements share a scale: ``per_tensor``, ``per_channel`` (one scale per
            output feature), ``per_group`` (``group_size`` consecutive input features) or
            ``per_rows`` (``group_size`` consecutive output features).
        group_size: input or output features per scale; read only by the last two.
        transposed: True if the parameter is stored [input features, output features], as Hugging
            Face's Conv1D does, instead of torch.nn.Linear's [output features, input features].
        scale_dtype: dtype that the scales were rounded to before codes were computed; None: the
            dtype of ``simulated``.
        activations: None for weight-only arithmetic; one of `moq.input_grid.KINDS` if the layer was
            trained with 8-bit activations: ``dynamic``, ``static``, ``dynamic_asymmetric`` or
            ``static_asymmetric`` (all exported as W8A8).
        input_scale: the scale of static activations, a number of ``scale_dtype``; otherwise None.
        input_zero_point: the zero point of static asymmetric activations, in [-128, 127]; otherwise
            None.
        scale: ``absmax``, ``mse`` or ``learned``: how the scales follow from the master.
        absmax: of learned scales: the magnitude, float32, that stands for the largest code of each
            group; otherwise None.
    """

    name: str
    master: torch.Tensor
    simulated: torch.Tensor
    num_bits: int
    mode: str = "symmetric"
    granularity: str = "per_channel"
    group_size: int = 0
    transposed: bool = False
    scale_dtype: torch.dtype | None = None
    activations: str | None = None
    scale: str = "absmax"
    input_scale: float | None = None
    input_zero_point: int | None = None
    absmax: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses what no grid or checkpoint can hold.

        Raises:
            ValueError: naming the parameter, the rule and the value.
        """

        def require(condition: bool, rule: str, got: object) -> None:
            if not condition:
                raise ValueError(f"{self.name}: {rule}, got {got!r}")

        require(
            self.simulated.dim() == 2,
            "a weight matrix must have 2 dimensions",
            self.simulated.dim(),
        )
        require(
            self.master.shape == self.simulated.shape,
            f"master must have the shape {list(self.simulated.shape)} of simulated",
            list(self.master.shape),
        )
        require(
            self.simulated.dtype in SCALE_DTYPES,
            "simulated must be float32, float16 or bfloat16",
            self.simulated.dtype,
        )
        require(self.mode in MODES, f"mode must be one of {MODES}", self.mode)
        least = 1 if self.mode == "binary" else 2
        require(least <= self.num_bits <= 16, f"num_bits must lie in [{least}, 16]", self.num_bits)
        require(
            self.granularity in GRANULARITIES,
            f"granularity must be one of {GRANULARITIES}",
            self.granularity,
        )
        require(
            self.granularity != "per_group"
            or (self.group_size > 0 and self.in_features % self.group_size == 0),
            f"group_size must be positive and divide the {self.in_features} input features",
            self.group_size,
        )
        require(
            self.granularity != "per_rows"
            or (self.group_size > 0 and self.out_features % self.group_size == 0),
            f"group_size must be positive and divide the {self.out_features} output features",
            self.group_size,
        )
        require(self.scale in SCALES, f"scale must be one of {SCALES}", self.scale)
        require(
            (self.scale == "learned") == (self.absmax is not None),
            "absmax must be given if the scale is learned, and only then",
            self.scale,
        )
        require(
            self.scale_dtype is None or self.scale_dtype in SCALE_DTYPES,
            "scale_dtype must be float32, float16 or bfloat16",
            self.scale_dtype,
        )
        require(
            self.activations is None or self.activations in KINDS,
            f"activations must be None or one of {KINDS}",
            self.activations,
        )
        static = self.activations is not None and is_static(self.activations)
        dtype = self.scale_dtype or self.simulated.dtype
        exact = None if self.input_scale is None else torch.tensor(self.input_scale).double()
        require(
            (exact is None and not static)
            or (
                exact is not None
                and static
                and bool(exact >= torch.finfo(dtype).tiny)
                and bool(exact.to(dtype).double() == exact)
            ),
            f"input_scale must be a positive normal number of {dtype} if activations are static, "
            "otherwise None",
            self.input_scale,
        )
        require(
            self.input_zero_point is None
            if self.activations != "static_asymmetric"
            else type(self.input_zero_point) is int and QMIN <= self.input_zero_point <= QMAX,
            f"input_zero_point must be an integer in [{QMIN}, {QMAX}] if activations are "
            "static_asymmetric, otherwise None",
            self.input_zero_point,
        )

    @property
    def out_features(self) -> int:
        """Number of output features, whatever the storage."""
        return self.simulated.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """Number of input features, whatever the storage."""
        return self.simulated.shape[0 if self.transposed else 1]
