"""Tokens per second of transformers on the demo's decoder in FP32, beside the engine's.

python examples/transformers_speed.py --threads 1
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from pretrained import load_decoder


def main() -> None:
    """Generates greedily with the key-value cache and prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="My fellow Americans, the state of our Union")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_decoder()
    model.eval()
    inputs = tokenizer(args.prompt, return_tensors="pt")

    def seconds(new_tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        return time.perf_counter() - started

    seconds(2)
    decode = seconds(args.max_new_tokens) - seconds(1)  # less the prompt's share
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    result = {
        "tokens_per_second": (args.max_new_tokens - 1) / decode,
        "megabytes": size / 1e6,
        "threads": args.threads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
