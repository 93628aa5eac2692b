"""The INT8 grids of inputs: which there are, and what a static one is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Kind = Literal["dynamic", "static", "dynamic_asymmetric", "static_asymmetric"]
KINDS: tuple[str, ...] = get_args(Kind)
QMIN, QMAX = -128, 127


def is_static(kind: str) -> bool:
    """Says whether all tokens share one grid, which training has found."""
    return kind.startswith("static")


def is_asymmetric(kind: str) -> bool:
    """Says whether the grid has a zero point."""
    return kind.endswith("asymmetric")


def mode_of(kind: str) -> str:
    """Returns the `mode` of the operators on activations."""
    return "asymmetric" if is_asymmetric(kind) else "symmetric"


def words_of(kind: str) -> str:
    """Returns the kind as a reader reads it: ``static asymmetric``."""
    return kind.replace("_", " ")


@dataclass(frozen=True)
class InputGrid:
    """How a layer reads its input.

    Attributes:
        kind: One of KINDS.
        scale: Step size of a static kind; otherwise None.
        zero_point: Code of 0 of a static asymmetric kind; otherwise None.
    """

    kind: str
    scale: float | None = None
    zero_point: int | None = None

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x on this grid, by the operator that training uses."""
        scale = None if self.scale is None else torch.tensor([self.scale], device=x.device)
        zero_point = None
        if self.zero_point is not None:
            zero_point = torch.tensor([self.zero_point], dtype=torch.int32, device=x.device)
        result: torch.Tensor = torch.ops.moq.fake_quantize_activation(
            x, scale, zero_point, mode=mode_of(self.kind)
        )
        return result


def static_grid(
    extent: torch.Tensor, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns step size and zero point (None: symmetric) that cover an extent.

    The formulas are those of kernels/quant_grid.h. The step size is rounded to the dtype in which a
    checkpoint stores it, before anything is computed with it.

    Args:
        extent: [2], float32: the largest magnitudes below and above 0; symmetric: the same twice.
        kind: A static one of KINDS.
        dtype: Of the layer's parameters.

    Returns:
        [1] float32 and [1] int32.
    """
    limits = torch.finfo(dtype)
    below, above = extent[:1], extent[1:]
    asymmetric = is_asymmetric(kind)
    # By a tensor: by a number a GPU multiplies with its reciprocal, which rounds otherwise.
    levels = torch.full_like(above, QMAX - QMIN if asymmetric else QMAX)
    scale = ((above + below if asymmetric else above) / levels).to(dtype)
    scale = scale.clamp(limits.tiny, limits.max).float()
    if not asymmetric:
        return scale, None
    position = QMIN + below * scale.reciprocal()
    return scale, position.round().clamp(QMIN, QMAX).int()
