"""Text and tensors to token ids: the tokenizer of a model directory, and the forms of input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
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
        TypeError: for what cannot be gone through, for bytes, which would count as token ids, and
            for mappings: of a tokenizer's output or a chat message Python would go through the
            keys, and these are texts.
    """
    if isinstance(inputs, Iterable) and not isinstance(inputs, Mapping | bytes | bytearray):
        return inputs
    remedy = ": make a text of it with decode()" if isinstance(inputs, bytes | bytearray) else ""
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
    if not isinstance(inputs, Tensor) and len(inputs) > 0 and isinstance(inputs[0], Integral):
        return [list(inputs)]
    return inputs


def as_mask(attention_mask: Any, values: Any) -> Tensor | None:
    """The attention mask of a tensor of token ids, bool, on the CPU.

    Raises:
        ValueError: for a mask without such a tensor, of another shape, of other numbers than 0 and
            1, or with padding between tokens, which would get other positions without it.
    """
    if attention_mask is None:
        return None
    if not isinstance(values, Tensor):
        raise ValueError(
            f"attention_mask must come with a tensor of token ids, got a {type(values).__name__}"
        )
    _require_matrix("token ids", values)
    mask = torch.as_tensor(attention_mask).cpu()
    if mask.shape != values.shape:
        raise ValueError(
            f"attention_mask must have the shape {list(values.shape)} of the token ids, got "
            f"{list(mask.shape)}"
        )
    kept = mask.bool()
    if not torch.equal(mask, kept.to(mask.dtype)):
        raise ValueError("attention_mask must be 1 at tokens and 0 at padding, got other numbers")
    begins = kept & ~torch.nn.functional.pad(kept, (1, 0))[:, :-1]
    holes = (begins.sum(dim=1) > 1).nonzero()
    if len(holes) > 0:
        raise ValueError(
            "attention_mask must be 0 on either side of a row's tokens only, got padding between "
            f"those of row {holes[0].item()}: leave these tokens out"
        )
    return kept


def unpad(what: str, values: Any, mask: Tensor | None) -> list[list[int]] | Tensor:
    """Rows without their padding: a tensor as it is, if it has none.

    Args:
        what: "token ids" or "token types".
        values: a [batch, length] tensor, or lists.
        mask: of a tensor of token ids, by as_mask.

    Raises:
        TypeError: for a list of anything but lists.
        ValueError: for a tensor of another shape.
    """
    if not isinstance(values, Tensor):
        if mask is not None:
            raise ValueError(
                f"{what} must be a tensor where there is an attention_mask, got a "
                f"{type(values).__name__}"
            )
        for row in values:
            if not isinstance(row, Iterable) or isinstance(row, str | bytes):
                raise TypeError(
                    f"{what} must be a [batch, length] tensor or a list of token lists, got a "
                    f"list of {type(row).__name__}"
                )
        return [list(row) for row in values]
    _require_matrix(what, values)
    if mask is None:
        return values
    if values.shape != mask.shape:
        raise ValueError(
            f"{what} must have the shape {list(mask.shape)} of the attention_mask, got "
            f"{list(values.shape)}"
        )
    return [row[kept].tolist() for row, kept in zip(values.cpu(), mask, strict=True)]


def _require_matrix(what: str, values: Tensor) -> None:
    if values.dim() != 2:
        raise ValueError(f"{what} must be [batch, length], got shape {list(values.shape)}")
