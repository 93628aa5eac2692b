"""The inference engine: serves exported moq checkpoints and plain Hugging Face models."""

from moq.inference.api import Encoding, Engine, Generation, Timing

__all__ = ["Encoding", "Engine", "Generation", "Timing"]
