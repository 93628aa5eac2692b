"""The inference engine: serves exported moq checkpoints and plain Hugging Face models."""

from moq.inference.api import Engine
from moq.inference.results import Encoding, Generation, Timing

__all__ = ["Encoding", "Engine", "Generation", "Timing"]
