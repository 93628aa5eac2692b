"""The inference engine: serves exported moq checkpoints and plain Hugging Face models."""

import moq

# A folder named moq without __init__.py, as a clone is, hides an installed package.
if getattr(moq, "__file__", None) is None:
    raise ImportError(
        f"`import moq` must find the installed package, got the folder {next(iter(moq.__path__))}: "
        "start Python in another directory than the one that holds the clone, or inside the clone"
    )

from moq.inference.api import Engine  # noqa: E402
from moq.inference.results import Encoding, Generation, Timing  # noqa: E402

__all__ = ["Encoding", "Engine", "Generation", "Timing"]
