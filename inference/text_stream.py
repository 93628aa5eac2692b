"""The text of a row that grows by one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for a part of a character


class TextStream:
    """The text of one generated row, as far as later tokens can't change it.

    What a token adds to the text depends on the tokens before it: a tokenizer may drop the space in
    front of a text's first word, and a character may be spread over several tokens. So each token
    is decoded together with the few before it, the prompt's last ones at first, and the text that
    those give alone is left out. The beginning of a stop string is no text yet: it waits until the
    tokens behind it decide.

    Attributes:
        stopped: True once a stop string has appeared.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Starts an empty row behind a prompt; it ends at the first of the strings in stop."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._pieces: list[str] = []
        self._undecided = ""  # text that may yet become a stop string
        # decode(window)[:given] is text already; a character ends behind window[:boundary].
        self._window = self._last_tokens(prompt)
        self._given = len(self._decode(self._window).rstrip(_UNFINISHED))
        self._boundary = len(self._window)

    @property
    def text(self) -> str:
        """What is settled; without the stop string that ended it."""
        return "".join(self._pieces)

    def append(self, *token_ids: int) -> str:
        """Adds tokens; returns the text that they settle."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        complete = len(text.rstrip(_UNFINISHED))
        added = text[self._given : complete]
        self._given = max(self._given, complete)
        if complete == len(text):
            newest = self._decode(self._window[self._boundary :])
            if newest and newest[0] != _UNFINISHED:  # enough for the next token to stand behind
                self._window = self._window[self._boundary :]
                self._given = len(newest)
            elif not newest and not added:  # tokens that no text shows, such as special ones
                self._window = self._window[: self._boundary]
            self._boundary = len(self._window)
        return self._settle(added)

    def finish(self) -> str:
        """Ends the row; returns the text that waited for more tokens."""
        if self.stopped:
            return ""
        text = self._decode(self._window)
        added = text[self._given :]
        self._given = len(text)
        return self._settle(added, final=True)

    def _settle(self, added: str, *, final: bool = False) -> str:
        text = self._undecided + added
        ends = [at for string in self._stop if (at := text.find(string)) >= 0]
        if ends:
            self.stopped = True
            end = min(ends)
        else:
            end = len(text) if final else len(text) - self._beginning_of_a_stop(text)
        self._undecided = text[end:]
        self._pieces.append(text[:end])
        return text[:end]

    def _beginning_of_a_stop(self, text: str) -> int:
        """Number of characters at the end that a stop string may begin with."""
        return max(
            (
                length
                for string in self._stop
                for length in range(1, min(len(string), len(text) + 1))
                if text.endswith(string[:length])
            ),
            default=0,
        )

    def _last_tokens(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from where a character begins."""
        count = 8
        while count < len(prompt):
            text = self._decode(prompt[-count:])
            if text and text[0] != _UNFINISHED:
                break
            count *= 2
        return list(prompt[-count:])

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
