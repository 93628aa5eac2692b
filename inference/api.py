"""The engine's Python front: loads a model directory, generates, encodes.

The work is done in C++ (inference/engine, bound as moq._C.Engine); this file turns text and
tensors into token ids and back.
"""

from __future__ import annotations

import json
import operator
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from moq import _C
from moq.caller_warning import warn_caller
from moq.directory_kind import refuse_run
from moq.inference.distributed import (
    connect,
    device_group_name,
    rank_device,
    release_before_the_group,
)
from moq.inference.results import Encoding, Generation, Timing
from moq.inference.text_stream import TextStream
from moq.inference.tokens import (
    as_mask,
    as_rows,
    is_text,
    load_tokenizer,
    require_sequences,
    stop_token_ids,
    unpad,
)
from moq.staging import recover
from moq.strict import suggestion

DTYPES = ("int8", "fp32", "fp16", "bf16")
#: How integer weights may be asked to read their inputs; static grids are those of a training.
ACTIVATIONS = ("dynamic", "dynamic_asymmetric")


Sequences = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


class Engine:
    """A model directory, ready to run on a GPU, or on the CPU with torch's number of threads.

    >>> engine = Engine.from_pretrained("out/model")  # doctest: +SKIP
    >>> print(engine.generate("My fellow Americans", max_new_tokens=64))  # doctest: +SKIP

    Attributes:
        directory: where the model came from.
        tokenizer: its Hugging Face tokenizer, or None.
        stop_token_ids: tokens that end a generated text.
        timing: of the last call of generate; None before.
    """

    def __init__(self, core: _C.Engine, directory: Path, tokenizer: Any) -> None:
        """Wraps a loaded engine; use from_pretrained."""
        self._core = core
        self.directory = directory
        self.tokenizer = tokenizer
        self.stop_token_ids = [i for i in stop_token_ids(directory) if 0 <= i < core.vocab_size]
        self.timing: Timing | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        compute_dtype: str | None = None,
        activations: str | None = None,
        quantize_head: bool | None = None,
        kv_cache_dtype: str | None = None,
        tp_size: int | None = None,
        policy: str | Path | None = None,
        group: dist.ProcessGroup | None = None,
        transport: str = "auto",
    ) -> Engine:
        """Loads an exported moq directory or a plain Hugging Face one.

        Args:
            directory: config.json, safetensors files and, for text, a tokenizer.
            device: "cpu" or "cuda" ("cuda:1"); None: the CPU. Of several ranks on "cuda" each takes
                the GPU of its LOCAL_RANK.
            dtype: what the weights are kept in: "int8", "fp32", "fp16" or "bf16"; None: as stored.
                "int8" quantizes the layers' projections and the head of a plain directory (8 bits,
                symmetric, one scale per output feature) and takes a quantized one as it is.
            compute_dtype: of the activations: "fp32", on a GPU also "fp16" or "bf16". None: on a
                GPU as dtype; beside integer weights "bf16" if the directory's floats are, else
                "fp16".
            activations: None: exact weight-only arithmetic, unless the checkpoint was trained for
                INT8 activations; "dynamic": INT8 with a scale per token; "dynamic_asymmetric": with
                a zero point per token too.
            quantize_head: False keeps the head of a plain directory out of dtype="int8".
            kv_cache_dtype: what a GPU keeps keys and values in: "int8" (a scale per token and head)
                or None: compute_dtype.
            tp_size: ranks that share the model; None: all that torchrun started.
            policy: a JSON policy for an architecture that moq doesn't know (docs/extend.md).
            group: the process group of the ranks; None: all of torchrun's.
            transport: how ranks reach each other: "auto", "shared_memory" or "c10d".

        Raises:
            TypeError: for a directory that is no path.
            ValueError: for an unsuitable argument.
            moq.Error: for an unsuitable directory; the message names file and key.
        """
        _check_directory(directory)
        _check_arguments(device, dtype, compute_dtype, activations, quantize_head, kv_cache_dtype)
        recover(directory)
        directory = Path(directory)
        refuse_run(directory)
        place = rank_device(device)
        communicator = connect(tp_size, group, transport, place)
        core = _C.Engine.open(
            directory,
            device=str(place),
            dtype=dtype,
            compute_dtype=compute_dtype,
            kv_cache_dtype=kv_cache_dtype,
            quantize_head=quantize_head,
            activations=activations,
            policy=None if policy is None else Path(policy),
            communicator=communicator,
            device_group=device_group_name(communicator, group, place),
        )
        release_before_the_group(core)
        return cls(core, directory, load_tokenizer(directory))

    def __repr__(self) -> str:
        """Directory, architecture, what weights and activations are kept in, and where."""
        core = self._core
        return (
            f"Engine({str(self.directory)!r}, {core.architecture}, {core.weight_format} weights, "
            f"{core.compute_dtype} activations, {core.device})"
        )

    @property
    def labels(self) -> dict[int, str]:
        """Names of a classifier's labels, as config.json gives them."""
        config = json.loads((self.directory / "config.json").read_text())
        return {int(label): name for label, name in (config.get("id2label") or {}).items()}

    @property
    def core(self) -> _C.Engine:
        """The C++ engine: sizes, formats, rank, KV caches."""
        return self._core

    def memory_report(self) -> dict[str, int]:
        """Bytes that the engine holds on its device: weights, kv_cache, workspace and their total.

        kv_cache is the one that generate keeps for its next call; 0 before the first. What the
        GPU's driver keeps (its context, code, captured graphs) is not among them.
        """
        report = self._core.memory_report()
        return report | {"total": sum(report.values())}

    @overload
    def generate(
        self, prompts: str | Sequence[int], max_new_tokens: int = ..., **options: Any
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = ...,
        **options: Any,
    ) -> list[Generation]: ...
    def generate(  # type: ignore[misc]  # options are the keywords here
        self,
        prompts: Any,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: int | Sequence[int] | None = None,
        max_batch: int = 16,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Generation | list[Generation]:
        """Continues one prompt or several.

        A row's tokens don't depend on the rows beside it.

        Args:
            prompts: a text, token ids, or a list of either.
            max_new_tokens: most tokens to draw per prompt.
            temperature: 0 takes the most likely token; otherwise logits are divided by it.
            top_k: draw among the k most likely tokens; 0: all.
            top_p: draw among the fewest tokens that reach this probability together.
            min_p: drop tokens below this share of the most likely one's probability.
            repetition_penalty: above 1, lowers tokens that the row already has.
            seed: makes sampling repeatable; None: a new one each time.
            stop: strings that end a row; not part of the text.
            stop_token_ids: tokens that end a row; None: the model's own.
            max_batch: rows computed together; the others wait.
            on_text: called with (row, piece) whenever text of a row is settled.

        Returns:
            A Generation for one prompt, a list for several, in their order.

        Raises:
            TypeError: for prompts that are neither text nor token ids, and for options of another
                type.
            ValueError: for text without a tokenizer, or stop strings without one.
            moq.Error: before anything is computed, for an empty or too long prompt, a token
                outside the vocabulary or an option out of range.
        """
        with self._core.outside_captures():
            ids, single = self._token_ids(prompts)
        top_k = _integer("top_k", top_k)
        temperature, top_p, min_p = (
            _number(name, value)
            for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p))
        )
        _warn_of_greedy(temperature, top_k, top_p, min_p)
        stop = [stop] if isinstance(stop, str) else _listed("stop", stop, "a text or texts")
        for end in stop:
            if not isinstance(end, str) or not end:
                raise TypeError(f"generate: stop must be a text or texts, got {end!r} among them")
        if (stop or on_text is not None) and self.tokenizer is None:
            raise ValueError(
                f"{self.directory} must have a tokenizer for stop strings and text streaming, got "
                "none: put its files there, or use stop_token_ids"
            )
        stop_tokens = self.stop_token_ids
        if stop_token_ids is not None:
            single_token = isinstance(stop_token_ids, Integral)
            given = [stop_token_ids] if single_token else stop_token_ids
            stop_tokens = [
                _integer("each of stop_token_ids", token)
                for token in _listed("stop_token_ids", given, "an integer or integers")
            ]
        watched = bool(stop) or on_text is not None

        @cache
        def text_of(row: int) -> TextStream:
            return TextStream(self.tokenizer, ids[row], stop)

        def give(row: int, piece: str) -> None:
            if piece and on_text is not None:
                on_text(row, piece)

        def on_token(row: int, token: int) -> bool:
            give(row, text_of(row).append(token))
            return not text_of(row).stopped

        result = self._core.generate(
            ids,
            max_new_tokens=_integer("max_new_tokens", max_new_tokens),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=_number("repetition_penalty", repetition_penalty),
            seed=secrets.randbits(63) if seed is None else _seed(seed),
            stop_tokens=stop_tokens,
            max_batch=_integer("max_batch", max_batch),
            on_token=on_token if watched else None,
        )
        self.timing = Timing(
            result.prompt_tokens,
            result.prefill_seconds,
            result.decode_tokens,
            result.decode_seconds,
        )
        generations = []
        for row, generated in enumerate(result.rows):
            text, reason = None, generated.finish_reason.name
            if self.tokenizer is not None:
                if not watched:
                    text_of(row).append(*generated.tokens)
                give(row, text_of(row).finish())
                text = text_of(row).text
                reason = "stop_string" if text_of(row).stopped else reason
            generations.append(Generation(text, generated.tokens, reason))
        return generations[0] if single else generations

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """Yields the new text of one prompt piece by piece; options as generate's.

        Leaving the iterator early ends the generation. Where several ranks share the model it runs
        to its end first, because the others can't know where this one was left.

        Raises:
            ValueError: for several prompts, whose pieces generate tells apart (on_text).
        """
        with self._core.outside_captures():
            ids, single = self._token_ids(prompt)
        if not single:
            raise ValueError(
                f"stream takes one prompt, got {len(ids)}: generate(prompts, on_text=…) tells the "
                "pieces of several apart"
            )
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        left = Event()

        def on_text(_: int, piece: str) -> None:
            if left.is_set() and self._core.tp_size == 1:
                raise GeneratorExit
            pieces.put(piece)

        def work() -> None:
            try:
                self.generate(ids[0], **options, on_text=on_text)
                pieces.put(None)
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                pieces.put(error)

        worker = Thread(target=work, daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            worker.join()

    def forward(
        self,
        input_ids: Sequence[Sequence[int]] | Tensor,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        token_type_ids: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Tensor | list[Tensor]:
        """Logits of every token, float32, on the engine's device.

        Args:
            input_ids: [batch, length] tensor, or a list of token lists of any lengths.
            attention_mask: [batch, length], 0 at padding on either side; padding is not computed.
            token_type_ids: [batch, length], for models with token types.

        Returns:
            [batch, length, vocab_size], 0 at padding; for a list one [length, vocab_size] each.

        Raises:
            TypeError: for what are no token ids.
            ValueError: for another shape, or a mask with padding between a row's tokens.
        """
        with self._core.outside_captures():
            mask = as_mask(attention_mask, input_ids)
            rows = unpad("token ids", require_sequences("forward", input_ids), mask)
            types: list[list[int]] | Tensor = []
            if token_type_ids is not None:
                types = unpad("token types", token_type_ids, mask)
            logits = self._core.forward(rows, types)
            if not isinstance(input_ids, Tensor):
                return list(torch.split(logits, [len(row) for row in rows]))
            if mask is None:
                return logits.view(*input_ids.shape, -1)
            padded = logits.new_zeros(*input_ids.shape, logits.shape[-1])
            padded[mask] = logits
            return padded

    def encode(
        self,
        inputs: Sequences,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        truncation: bool = False,
    ) -> Encoding:
        """Hidden states, sentence vectors and class logits of sequences.

        Args:
            inputs: a text, texts, pairs of texts, a list of token lists, or a [batch, length]
                tensor.
            attention_mask: of a tensor: 0 at padding on either side.
            truncation: leaves out what of a text is beyond the model's positions.

        Returns:
            The encodings, in the order of the inputs.

        Raises:
            TypeError: for inputs that are neither text nor token ids.
            ValueError: for a mask that is not of a tensor, and for truncation of token ids.
            moq.Error: for an empty or too long one, a token outside the vocabulary.
        """
        with self._core.outside_captures():
            rows: list[list[int]] | Tensor
            types: list[list[int]] = []
            require_sequences("encode", inputs)
            mask = as_mask(attention_mask, inputs)
            if isinstance(inputs, Tensor) or not is_text(inputs):
                if truncation:
                    raise ValueError(
                        "encode: truncation must be False for token ids, got True: leave out those "
                        f"beyond {self._core.max_positions}"
                    )
                rows = unpad("token ids", as_rows(inputs), mask)
            else:
                texts = [inputs] if isinstance(inputs, str) else list(inputs)
                rows, types = self._ids_and_types(texts, truncation)
            encoding = self._core.encode(rows, types)
            states = encoding.last_hidden_state
            lengths = [len(row) for row in rows]
            split = list(torch.split(states, lengths))
            # Not by torch.segment_reduce, which adds tokens one after the other.
            if len(set(lengths)) == 1:
                mean = states.view(len(lengths), lengths[0], -1).mean(1)
            else:
                mean = torch.stack([tokens.mean(0) for tokens in split])
            return Encoding(split, mean, encoding.pooled, encoding.logits)

    def _token_ids(self, prompts: Any) -> tuple[list[list[int]], bool]:
        """Prompts as lists of token ids, and whether there was just one."""
        if isinstance(prompts, Tensor):
            is_of_ids = not prompts.is_floating_point() and prompts.dtype != torch.bool
            if not is_of_ids or prompts.dim() not in (1, 2):
                raise TypeError(
                    "generate: a prompt's tensor must have integers, [length] or [batch, length], "
                    f"got {prompts.dtype} of shape {list(prompts.shape)}"
                )
            prompts = prompts.tolist()
        if isinstance(prompts, str):
            return [self._encode_text(prompts)], True
        prompts = list(require_sequences("generate", prompts))
        if not prompts or isinstance(prompts[0], Integral):
            return [prompts], True
        for prompt in prompts:
            require_sequences("generate", prompt)
        return [
            self._encode_text(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in prompts
        ], False

    def _ids_and_types(
        self, texts: list[Any], truncation: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and, for models with more than one, token types of texts or pairs of texts."""
        most = self._core.max_positions
        tokens = self._require_tokenizer()(
            texts, truncation=truncation, max_length=most if truncation else None, verbose=False
        )
        for text, row in zip(texts, tokens["input_ids"], strict=True):
            if len(row) > most:
                first = text if isinstance(text, str) else text[0]
                raise _C.Error(
                    f"encode: a text must have at most {most} tokens, got {len(row)} for "
                    f"{first[:40]!r}…: shorten it, or give truncation=True"
                )
        has_types = self._core.num_token_types > 1
        return tokens["input_ids"], tokens.get("token_type_ids", []) if has_types else []

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._require_tokenizer()(text)["input_ids"]
        return ids

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.directory} must have a tokenizer to take text, got none: export with "
                "tokenizer=…, put tokenizer.json there, or give token ids from Python"
            )
        return self.tokenizer


def _listed(name: str, values: Any, what: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"generate: {name} must be {what}, got {values!r}")
    return list(values)


def _integer(name: str, value: Any, least: int = -(1 << 63), most: int = (1 << 63) - 1) -> int:
    """The value as an int; unless other bounds are given, one that a C++ integer takes."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"generate: {name} must be an integer, got {value!r}") from None
    if not least <= integer <= most:
        raise ValueError(f"generate: {name} must be >= {least} and <= {most}, got {integer}")
    return integer


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"generate: {name} must be a number, got {value!r}")


def _seed(value: Any) -> int:
    return _integer("seed", value, least=0, most=(1 << 64) - 1)


def _warn_of_greedy(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Warns of options that choose among tokens where the most likely one is taken."""
    chosen = {"top_k": top_k != 0, "top_p": top_p != 1, "min_p": min_p != 0}
    idle = [name for name, is_given in chosen.items() if is_given]
    if idle and temperature == 0:
        warn_caller(
            f"generate: {' and '.join(idle)} must be left out at temperature 0, which takes the "
            "most likely token: give a temperature above 0 to draw among several"
        )


def _short(dtype: object) -> str:
    """Returns ' (did you mean X?)' for a dtype in torch's spelling, or for one near to ours."""
    name = str(dtype).removeprefix("torch.").lower()
    ours = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}.get(name)
    return suggestion(name, DTYPES) if ours is None else f" (did you mean {ours!r}?)"


def _check_directory(directory: Any) -> None:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory must be the path of a model's directory, got {directory!r}")
    if not os.fspath(directory):
        raise ValueError(
            "directory must be the path of a model's directory, got '': '.' is the current one"
        )


def _check_arguments(
    device: str | torch.device | None,
    dtype: str | None,
    compute_dtype: str | None,
    activations: str | None,
    quantize_head: bool | None,
    kv_cache_dtype: str | None,
) -> None:
    try:
        kind = "cpu" if device is None else torch.device(device).type
    except RuntimeError:  # no device of torch
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be None, 'cpu', 'cuda' or 'cuda:N', got {str(device)!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be None or one of {', '.join(DTYPES)}, got {dtype!r}{_short(dtype)}"
        )
    if kind == "cpu" and compute_dtype not in (None, "fp32"):
        raise ValueError(
            f"compute_dtype must be None or 'fp32' on the CPU, got {compute_dtype!r}. Remedy: "
            "leave it out; dtype chooses what the weights are kept in"
        )
    if compute_dtype not in (None, "fp32", "fp16", "bf16"):
        raise ValueError(
            f"compute_dtype must be None or one of fp32, fp16, bf16, got {compute_dtype!r}"
            f"{_short(compute_dtype)}"
        )
    if activations not in (None, *ACTIVATIONS):
        raise ValueError(
            "activations must be None, 'dynamic' or 'dynamic_asymmetric', got "
            f"{activations!r}{suggestion(str(activations), ACTIVATIONS)}"
        )
    if quantize_head is not None and not isinstance(quantize_head, bool):
        raise TypeError(f"quantize_head must be None, True or False, got {quantize_head!r}")
    if quantize_head and dtype != "int8":
        raise ValueError(f"quantize_head=True needs dtype='int8', got dtype={dtype!r}")
    if kv_cache_dtype not in (None, "int8") or (kind == "cpu" and kv_cache_dtype is not None):
        raise ValueError(
            f"kv_cache_dtype must be None, or 'int8' on a GPU, got {kv_cache_dtype!r} on {kind}"
        )
