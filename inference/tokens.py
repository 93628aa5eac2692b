"""Text to token ids and back: the tokenizer of a model directory, and text that grows by tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for half a character


def load_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer that lies beside a model.

    Returns:
        A Hugging Face tokenizer, or None if the directory has none.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
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


class TextStream:
    """The text of one generated row, as far as later tokens can't change it.

    A token may hold half a character, and the beginning of a stop string is not yet text: both wait
    until the tokens behind them decide.

    Attributes:
        text: what is settled; without the stop string that ended it.
        stopped: True once a stop string has appeared.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """Starts an empty row that ends at the first of the strings in stop."""
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._token_ids: list[int] = []

    def append(self, token_id: int) -> str:
        """Adds a token; returns the text that it settles."""
        self._token_ids.append(token_id)
        return self._settle(final=False)

    def finish(self) -> str:
        """Ends the row; returns the text that waited for more tokens."""
        return "" if self.stopped else self._settle(final=True)

    def _settle(self, *, final: bool) -> str:
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        ends = [at for string in self._stop if (at := text.find(string)) >= 0]
        if ends:
            self.stopped = True
            text = text[: min(ends)]
        elif not final:
            text = text[: len(text) - self._undecided(text)]
        settled = text[len(self.text) :]
        self.text += settled
        return settled

    def _undecided(self, text: str) -> int:
        """Number of characters at the end that later tokens may still change."""
        waiting = len(text) - len(text.rstrip(_UNFINISHED))
        for string in self._stop:
            for length in range(min(len(string) - 1, len(text)), waiting, -1):
                if text.endswith(string[:length]):
                    waiting = length
                    break
        return waiting


def is_text(inputs: Any) -> bool:
    """True for a text, texts, or pairs of texts."""
    if isinstance(inputs, str):
        return True
    first = next(iter(inputs), None)
    return isinstance(first, str) or (isinstance(first, tuple) and isinstance(first[0], str))


def as_rows(inputs: Any) -> Any:
    """A list of token ids alone counts as a list of one sequence."""
    if not isinstance(inputs, Tensor) and len(inputs) > 0 and isinstance(inputs[0], int):
        return [list(inputs)]
    return inputs


def unpad(values: Any, attention_mask: Tensor | None) -> list[list[int]]:
    """Rows without their padding."""
    if not isinstance(values, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask must come with a tensor of token ids, got lists")
        return [list(row) for row in values]
    if values.dim() != 2:
        raise ValueError(f"token ids must be [batch, length], got shape {list(values.shape)}")
    if attention_mask is None:
        return [row.tolist() for row in values]
    if attention_mask.shape != values.shape:
        raise ValueError(
            f"attention_mask must have the shape {list(values.shape)} of the token ids, got "
            f"{list(attention_mask.shape)}"
        )
    return [row[mask.bool()].tolist() for row, mask in zip(values, attention_mask, strict=True)]
