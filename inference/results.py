"""What the engine returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """What a prompt was continued with.

    Attributes:
        text: the new text; None if the prompt was token ids and the directory has no tokenizer.
        token_ids: the new tokens, a stop token included.
        finish_reason: ``length``, ``stop_token`` or ``stop_string``.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str

    def __str__(self) -> str:
        """The new text, so that a generation can be printed."""
        return str(self.token_ids) if self.text is None else self.text


@dataclass(frozen=True)
class Timing:
    """How long one call of generate took, reading prompts and drawing tokens apart.

    Attributes:
        prompt_tokens: tokens of all prompts.
        prefill_seconds: time of the steps that read prompts; each draws a row's first token.
        decode_tokens: tokens drawn by the other steps.
        decode_seconds: time of those.
    """

    prompt_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens drawn per second after the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Encoding:
    """What an encoder makes of n sequences, float32.

    Attributes:
        last_hidden_state: per sequence [num_tokens, hidden_size].
        mean: [n, hidden_size], the mean over each sequence's tokens.
        pooled: [n, hidden_size], activation(dense(first token)); None without a pooler.
        logits: [n, num_labels]; None without a sequence-classification head.
    """

    last_hidden_state: list[Tensor]
    mean: Tensor
    pooled: Tensor | None
    logits: Tensor | None
