"""What moq adds to a training step on a CPU, for the encoder of the demo (MiniLM-L6's shape).

Two models of the same weights take turns: one AdamW step with moq, one without, on the same batch.
Load of the machine then hits both alike. Wall time is what counts; processor time, which other
processes disturb less, tells what a busy machine's wall time hides.
"""

import argparse
import statistics
import time

import torch
from report import Row, print_rows
from transformers import BertConfig, BertForSequenceClassification

import moq

BATCH_SIZE, NUM_LABELS = 32, 26
MINILM = BertConfig(
    hidden_size=384,
    intermediate_size=1536,
    num_attention_heads=12,
    num_hidden_layers=6,
    num_labels=NUM_LABELS,
)


def build() -> BertForSequenceClassification:
    """The encoder with the same random weights each time."""
    torch.manual_seed(0)
    return BertForSequenceClassification(MINILM)


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict
) -> tuple[float, float]:
    """Wall and processor seconds of one training step."""
    wall, processor = time.perf_counter(), time.process_time()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(sequence_length: int, rounding: str, steps: int) -> list[Row]:
    """Interleaved steps with and without moq, 16 to 8 bits falling throughout."""
    plain, quantized = build(), build()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-5)
    wrapped = moq.MoQOptimizer(
        torch.optim.AdamW(quantized.parameters(), lr=2e-5),
        quantized,
        {"rounding": rounding, "schedule": {"finish_at": 1.0}},
        total_steps=steps + 1,
        verbose=False,
    )
    batch = {
        "input_ids": torch.randint(MINILM.vocab_size, (BATCH_SIZE, sequence_length)),
        "labels": torch.randint(NUM_LABELS, (BATCH_SIZE,)),
    }
    step(plain, optimizer, batch)
    step(quantized, wrapped, batch)
    plain_times, moq_times = [], []
    for _ in range(steps):
        plain_times.append(step(plain, optimizer, batch))
        moq_times.append(step(quantized, wrapped, batch))
    case = f"MiniLM-L6 batch {BATCH_SIZE} x {sequence_length}, {rounding}"
    rows = []
    for clock, name in enumerate(("wall", "processor")):
        own, other = ([times[clock] * 1e3 for times in side] for side in (moq_times, plain_times))
        rows.append(Row(f"{case}, {name} time, best of {steps}", min(own), min(other), "ms"))
        medians = statistics.median(own), statistics.median(other)
        rows.append(Row(f"{case}, {name} time, median of {steps}", *medians, "ms"))
    return rows


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for rounding in ("nearest", "stochastic"):
        rows += compare(arguments.sequence_length, rounding, arguments.steps)
    print_rows("training step", "plain step", rows, arguments.json)


if __name__ == "__main__":
    main()
