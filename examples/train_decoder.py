"""Trains SmolLM2-135M on State of the Union speeches with MoQ, 16 -> 8 bits, and exports it.

Speeches up to 2000 are learnt from, those from 2001 on are held out. First a short fine-tuning in
full precision, so that what follows compares quantization and not the text; then MoQ: every linear
layer is simulated at a bit width that falls from 16 to 8, each transformer block at its own pace
set by the trace of its Hessian, all of them at 8 bits by 60 % of the steps.

    python examples/train_decoder.py                     # a few minutes on 2 cores
    python examples/train_decoder.py --moq-steps 400 --fp32-steps 200   # the README's table
    python examples/train_decoder.py --run out/decoder-run              # saves the run too, for
    moq report out/decoder-run -o report.html                           # a page about it
"""

import argparse
import json
import time
from pathlib import Path

import torch
from language_modelling import Perplexity, perplexity, token_windows, train_steps
from pretrained import load_decoder, state_of_the_union

import moq
from moq.inference import Engine
from moq.loggers import CsvLogger

PROBE_WINDOWS = 1


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/decoder"), help="checkpoint directory to write"
    )
    parser.add_argument(
        "--fp32-steps", type=int, default=25, help="fine-tuning steps of 256 tokens before MoQ"
    )
    parser.add_argument("--moq-steps", type=int, default=40, help="MoQ steps of 256 tokens")
    parser.add_argument(
        "--held-out-windows", type=int, default=16, help="of 256 tokens, for each perplexity"
    )
    parser.add_argument("--run", type=Path, help="directory to save the run to, with its figures")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0, help="chooses the training windows")
    return parser.parse_args()


def main() -> None:
    """Trains, measures, exports, measures again."""
    args = parse_arguments()
    torch.manual_seed(args.seed)

    started = time.perf_counter()
    model, tokenizer = load_decoder()
    train_text, held_out_text = state_of_the_union()
    held_out = token_windows(tokenizer, held_out_text, args.held_out_windows)
    steps = args.fp32_steps + args.moq_steps
    windows = token_windows(tokenizer, train_text, steps + PROBE_WINDOWS, seed=args.seed)
    fp32_windows, moq_windows, probe = windows.split(
        [args.fp32_steps, args.moq_steps, PROBE_WINDOWS]
    )
    print(
        f"SmolLM2-135M and {len(train_text) / 1e6:.1f} MB of speeches "
        f"in {time.perf_counter() - started:.0f} s"
    )

    def simulated(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids).logits

    results: dict[str, Perplexity] = {"original": perplexity(simulated, held_out, "original")}

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    for _ in train_steps(model, optimizer, fp32_windows, "fine-tuning, FP32", warmup_steps=5):
        pass
    del optimizer
    results["fine-tuned, FP32"] = perplexity(simulated, held_out, "fine-tuned, FP32")

    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.learning_rate / 2, weight_decay=0.01),
        model,
        {
            "start_bits": 16,
            "target_bits": 8,
            "schedule": {"finish_at": 0.6},
            "sensitivity": {"max_cost": None},  # 2 % of so few steps is less than one measurement
        },
        total_steps=args.moq_steps,
        loggers=[CsvLogger(args.run.with_name(args.run.name + ".csv"))] if args.run else [],
        log_every=max(args.moq_steps // 50, 1),
    )
    optimizer.log({"held-out perplexity": results["fine-tuned, FP32"].value})
    optimizer.probe(lambda batch: model(input_ids=batch, labels=batch).loss, list(probe.split(1)))
    for loss in train_steps(model, optimizer, moq_windows, "MoQ, 16 -> 8 bits", warmup_steps=5):
        optimizer.log({"loss": loss})
    results["MoQ INT8, simulated in PyTorch"] = perplexity(
        simulated, held_out, "MoQ INT8, simulated"
    )

    optimizer.log({"held-out perplexity": results["MoQ INT8, simulated in PyTorch"].value})
    if args.run:
        optimizer.save(args.run, tokenizer=tokenizer)
    optimizer.export(args.output, tokenizer=tokenizer)
    engine = Engine.from_pretrained(args.output)
    results["MoQ INT8, exported, in the engine"] = perplexity(
        engine.forward, held_out, "MoQ INT8, engine"
    )

    for name, value in results.items():
        print(f"{name:36} perplexity {value}")
    report = {
        name: {"perplexity": p.value, "standard_error": p.standard_error}
        for name, p in results.items()
    }
    args.output.with_name(args.output.name + "-perplexity.json").write_text(
        json.dumps(report, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
