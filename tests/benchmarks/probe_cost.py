"""What sensitivity costs in a whole training, by the clock: the share that max_cost grants.

BERT-base's shape, random weights and tokens. After five steps, from which the pace is known,
`probe_regularly` measures as often as `max_cost` has room. The rows compare what all measurements
took, by a clock around them, with that share of what the training took in the end: by wall time,
which other processes disturb, and by processor time.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import redirect_stdout

import gpu
import torch
from report import Row, print_rows
from train_step_cpu import NUM_LABELS, encoder

import moq


def clocks() -> tuple[float, float]:
    """Wall time and processor time."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=["bert-base", "minilm-l6"], default="bert-base")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--batch", type=int, default=1, help="rows (1)")
    add("--seq", type=int, default=16, help="tokens of a row (16)")
    add("--steps", type=int, default=800)
    add("--measure", choices=["trace", "eigenvalue", "both"], default="trace")
    add("--max-cost", type=float, default=0.02)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if args.device == "cuda":
        gpu.require()
    model = encoder(args.model).to(args.device)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(model.config.vocab_size, (args.batch, args.seq), device=args.device)
        return {"input_ids": ids, "labels": torch.randint_like(ids[:, 0], NUM_LABELS)}

    with redirect_stdout(sys.stderr):  # standard output is the result's
        optimizer = moq.MoQOptimizer(
            torch.optim.AdamW(model.parameters(), lr=2e-5),
            model,
            {"sensitivity": {"max_cost": args.max_cost, "measure": args.measure}},
            total_steps=args.steps,
        )
        measuring, started = [0.0, 0.0], clocks()
        for step in range(args.steps):
            if step == 5:
                before = clocks()
                optimizer.probe_regularly(lambda b: model(**b).loss, [batch()], progress=False)
                measuring = [m + t - b for m, t, b in zip(measuring, clocks(), before, strict=True)]
            model(**batch()).loss.backward()
            known = len(optimizer.history)
            before = clocks()
            optimizer.step()
            if len(optimizer.history) > known:  # the step of a measurement is counted with it
                measuring = [m + t - b for m, t, b in zip(measuring, clocks(), before, strict=True)]
            optimizer.zero_grad()
        ended = clocks()
    case = f"{args.model}, {args.batch} x {args.seq} tokens, {args.steps} steps, {args.measure}"
    made = len(optimizer.history), sum(entry["products"] for entry in optimizer.history)
    rows = []
    for kind, own, begin, end in zip(("wall", "processor"), measuring, started, ended, strict=True):
        total = end - begin - own
        note = f"({own / total:.2%} of {total:.0f} s; {made[0]} measurements, {made[1]} products)"
        rows.append(Row(f"{case}, {kind} time", own, args.max_cost * total, "s", note))
    facts = gpu.facts_on(args.device)
    print_rows("Time for sensitivity", f"max_cost {args.max_cost:g}", rows, args.json, facts)


if __name__ == "__main__":
    main()
