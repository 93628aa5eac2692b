"""Warnings that point at the line of the script that they concern."""

from __future__ import annotations

import sys
import warnings

#: Packages between a script and what warns: none of their lines is one that its reader could mend.
_BETWEEN = frozenset(
    {
        "moq",
        "torch",
        "transformers",
        "accelerate",
        "lightning",
        "lightning_fabric",
        "pytorch_lightning",
        "contextlib",
    }
)


def warn_caller(message: str) -> None:
    """Warns, naming the innermost line that no library between the script and moq has."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package_of(frame.f_globals) in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package_of(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
