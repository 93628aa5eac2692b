"""The files, and one folder, that a tokenizer leaves beside a model."""

import os
from pathlib import Path

# Any one of them is enough to load a tokenizer from.
_SUFFICIENT_FILES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = (
    *_SUFFICIENT_FILES,
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
)


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Says whether a model's directory holds a tokenizer."""
    return any((Path(directory) / name).is_file() for name in _SUFFICIENT_FILES)
