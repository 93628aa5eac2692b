"""Warnings that point at the line of the script that they concern."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

#: Packages between a script and what warns (torch, the trainers that moq has integrations for,
#: threads): none of their lines is one that the reader of a warning could mend.
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
        "threading",
        "concurrent",
    }
)


def warn_caller(message: str) -> None:
    """Warns, naming the innermost line that no library between the script and moq has.

    Without one, as in a thread, it is the innermost line outside moq.
    """
    packages = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        packages.append(str(frame.f_globals.get("__name__", "")).partition(".")[0])
        frame = frame.f_back
    outside = [level for level, package in enumerate(packages) if package != "moq"]
    script = [level for level in outside if packages[level] not in _BETWEEN]
    level = (script or outside or [0])[0]
    warnings.warn(message, stacklevel=level + 2)
