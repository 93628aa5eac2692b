"""Text and tensors to token ids: the tokenizer of a model directory, and the forms of input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moq.tokenizer_files import has_tokenizer


def load_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer that lies beside a model.

    Returns:
        A Hugging Face tokenizer, or None if the directory has none.
    """
    if not has_tokenizer(directory):
        return None
    from transformers import AutoTokenizer  # takes seconds to import, and token ids don't need it

    return AutoTokenizer.from_pretrained(directory)


def stop_token_ids(directory: Path) -> list[int]:
    """Token ids that end a generated text, as generation_config.json or config.json name them."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.exists():
            value = json.loads(path.read_text()).get("eos_token_id")
            if value is not None:
                return list(value) if isinstance(value, list) else [value]
    return []


def is_text(inputs: Any) -> bool:
    """True for a text, texts, or pairs of texts."""
    if isinstance(inputs, str):
        return True
    first = next(iter(inputs), None)
    return isinstance(first, str) or (isinstance(first, tuple) and isinstance(first[0], str))


def require_sequences(where: str, inputs: Any) -> Any:
    """Returns `inputs` if they can be text or token ids.

    Raises:
        TypeError: for what cannot be gone through, and for mappings: of a tokenizer's output or a
            chat message Python would go through the keys, and these are texts.
    """
    if isinstance(inputs, Iterable) and not isinstance(inputs, Mapping):
        return inputs
    remedy = ""
    if isinstance(inputs, Mapping):
        remedy = (
            ": give its 'input_ids'"
            if "input_ids" in inputs
            else ": make a text of messages with engine.tokenizer.apply_chat_template"
        )
    raise TypeError(
        f"{where}: a prompt must be a text or token ids, or a list of either, got "
        f"{type(inputs).__name__}{remedy}"
    )


def as_rows(inputs: Any) -> Any:
    """A list of token ids alone counts as a list of one sequence."""
    if not isinstance(inputs, Tensor) and len(inputs) > 0 and isinstance(inputs[0], int):
        return [list(inputs)]
    return inputs


def unpad(values: Any, attention_mask: Tensor | None) -> list[list[int]] | Tensor:
    """Rows without their padding: a tensor as it is, if it has none."""
    if not isinstance(values, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask must come with a tensor of token ids, got lists")
        return [list(row) for row in values]
    if values.dim() != 2:
        raise ValueError(f"token ids must be [batch, length], got shape {list(values.shape)}")
    if attention_mask is None:
        return values
    if attention_mask.shape != values.shape:
        raise ValueError(
            f"attention_mask must have the shape {list(values.shape)} of the token ids, got "
            f"{list(attention_mask.shape)}"
        )
    return [row[mask.bool()].tolist() for row, mask in zip(values, attention_mask, strict=True)]
