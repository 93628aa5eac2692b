"""MoQ: training at a bit width that falls, and fused INT8 inference of what was trained."""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

for _distribution in _metadata.distributions(name="moq"):
    raise ImportError(
        "two packages share the import name 'moq': torch-moq (this one) and the PyPI package 'moq' "
        f"{_distribution.version} are installed side by side and overwrite each other's files. "
        "Remedy: pip uninstall -y moq torch-moq, then install torch-moq again (README.md)"
    )

_REMEDY = (
    "In a checkout, build it with `make build` and use .venv/bin/python; if torch was changed "
    "since, build again."
)

try:
    import torch as _torch  # noqa: F401  (its libraries must be loaded before the extension's)
except ImportError as error:
    raise ImportError(f"moq needs torch, which did not load here ({error}). {_REMEDY}") from error

try:
    from moq import _C  # noqa: F401
except ImportError as error:
    raise ImportError(f"moq's compiled extension did not load ({error}). {_REMEDY}") from error

__version__ = "0.1.0"

from moq._C import Error  # noqa: E402

Error.__module__ = __name__  # where users find it, as tracebacks say

from moq.config import (  # noqa: E402
    MoQConfig,
    ObserverConfig,
    QuantSpec,
    Rule,
    ScheduleConfig,
    SensitivityConfig,
    Timing,
)

if _TYPE_CHECKING:
    from moq.adamw import AdamW
    from moq.optimizer import MoQOptimizer
    from moq.spectrum import spectral_density

__all__ = [
    "AdamW",
    "Error",
    "MoQConfig",
    "MoQOptimizer",
    "ObserverConfig",
    "QuantSpec",
    "Rule",
    "ScheduleConfig",
    "SensitivityConfig",
    "Timing",
    "spectral_density",
]


def __getattr__(name: str) -> _Any:
    """Loads what training needs at its first use.

    It needs torch's DTensor, which takes seconds to import; a rank that serves has no use for it.
    """
    if name == "AdamW":
        from moq.adamw import AdamW

        return AdamW
    if name == "MoQOptimizer":
        from moq.optimizer import MoQOptimizer

        return MoQOptimizer
    if name == "spectral_density":
        from moq.spectrum import spectral_density

        return spectral_density
    raise AttributeError(f"module 'moq' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists what is loaded at its first use too."""
    return sorted({*globals(), *__all__})
