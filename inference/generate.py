"""`generate`: text from a checkpoint directory."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from moq.inference.api import Engine
from moq.inference.options import (
    add_engine_arguments,
    describe,
    is_first_rank,
    open_engine,
    read_standard_input,
)
from moq.inference.results import Generation

_EXAMPLES = """examples:
  python -m moq.inference generate out/model --prompt "My fellow Americans" --stream
  python -m moq.inference generate out/model --chat --prompt "Who are you?" --temperature 0.7
  torchrun --standalone --nproc-per-node 2 -m moq.inference generate out/model --prompt "Hello"

Without --temperature the most likely token is taken. Several --prompt options make one batch.
Under torchrun the ranks share the model (tensor parallel) and rank 0 prints."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_engine_arguments(parser)
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; may be given several times; '-' reads standard input (default)",
    )
    parser.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    parser.add_argument("--system", help="system message of the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], help="string that ends the text")
    parser.add_argument("--ignore-eos", action="store_true", help="draw all --max-new-tokens")
    sampling = parser.add_argument_group("how a token is chosen")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    sampling.add_argument("--top-k", type=int, default=0, help="among the K most likely; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, help="among this much probability")
    sampling.add_argument("--min-p", type=float, default=0.0, help="above this share of the best")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: penalize")
    sampling.add_argument("--seed", type=int, help="makes sampling repeatable")
    output = parser.add_argument_group("what is printed")
    output.add_argument("--stream", action="store_true", help="print text as it is drawn")
    output.add_argument(
        "--json", action="store_true", help="one JSON object per prompt, a line each"
    )


def run(args: argparse.Namespace) -> int:
    """Generates and prints; returns the exit status."""
    engine = open_engine(args)
    texts = [read_standard_input(engine) if text == "-" else text for text in args.prompt or ["-"]]
    prompts: list[Any] = texts
    is_chat = bool(args.chat or args.system)
    if is_chat:
        prompts = [_chat_prompt(engine, text, args.system) for text in texts]
    show = is_first_rank()
    stream = show and args.stream and not args.json and len(prompts) == 1
    generations = engine.generate(
        prompts,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        stop_token_ids=[] if args.ignore_eos else None,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if stream else None,
    )
    if show:
        _print(engine, texts, generations, args.json, streamed=stream, is_chat=is_chat)
    return 0


def _chat_prompt(engine: Engine, text: str, system: str | None) -> list[int]:
    """Token ids of a user's message in the model's chat template."""
    tokenizer = engine.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"--chat needs a tokenizer with a chat template, and {engine.directory} has none: "
            "leave --chat out"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def _print(
    engine: Engine,
    texts: list[str],
    generations: list[Generation],
    as_json: bool,
    *,
    streamed: bool,
    is_chat: bool,
) -> None:
    timing = engine.timing
    assert timing is not None
    for text, generation in zip(texts, generations, strict=True):
        if as_json:
            result = {
                "prompt": text,
                "text": generation.text,
                "token_ids": generation.token_ids,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": timing.prompt_tokens,
                "prefill_tokens_per_second": timing.prefill_tokens_per_second,
                "decode_tokens_per_second": timing.decode_tokens_per_second,
                **describe(engine),
            }
            print(json.dumps(result, ensure_ascii=False))
        elif not streamed:
            print(str(generation) if is_chat else text + str(generation))  # an answer, or all text
    if streamed:
        print()
    if not as_json:
        print(
            f"prefill {timing.prefill_tokens_per_second:.1f} tokens/s, "
            f"decode {timing.decode_tokens_per_second:.1f} tokens/s "
            f"({', '.join(f'{key} {value}' for key, value in describe(engine).items())})",
            file=sys.stderr,
        )
