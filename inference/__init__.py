"""The inference engine: serves exported moq checkpoints and plain Hugging Face models."""
