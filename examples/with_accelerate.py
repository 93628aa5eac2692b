"""MoQ in a loop of accelerate: MiniLM-L6 learns the topics of WordNet glosses, 16 -> 8 bits.

`prepare` takes the MoQOptimizer as it takes any optimizer, and the Accelerator is one of its
loggers. `save_state` keeps masters and schedule: here the training stops half-way, is made anew
and goes on from that state.

    python examples/with_accelerate.py                # about a minute on 2 cores
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from glosses import CONFIG, Task, check_export, load_task, parse_arguments
from torch.utils.data import DataLoader

import moq
from moq.integrations.accelerate import num_training_steps, unwrap_optimizer


def train(args: argparse.Namespace, task: Task, state: Path, resume: bool) -> None:
    """Trains the first half and saves, or goes on from there and exports."""
    run = args.output.with_name(args.output.name + "-run")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=run)
    accelerator.init_trackers("moq")
    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW(task.model.parameters(), lr=args.learning_rate),
        task.model,
        CONFIG,
        total_steps=num_training_steps(accelerator, task.batches),
        verbose=not resume,
        loggers=accelerator,
    )
    half = len(task.batches) // 2
    batches = task.batches[half:] if resume else task.batches[:half]
    model, prepared, loader = accelerator.prepare(
        task.model, optimizer, DataLoader(batches, batch_size=None)
    )
    if resume:
        accelerator.load_state(state)
        print(f"resumed at step {unwrap_optimizer(prepared).steps}")
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        prepared.zero_grad()
    if resume:
        optimizer.export(args.output, tokenizer=task.tokenizer)
    else:
        accelerator.save_state(state)
    accelerator.end_training()


def main() -> None:
    """Trains in two halves, exports, compares."""
    args = parse_arguments(__doc__, "out/with-accelerate")
    state = args.output.with_name(args.output.name + "-state")
    train(args, load_task(args), state, resume=False)
    task = load_task(args)
    train(args, task, state, resume=True)
    check_export(task, args.output)


if __name__ == "__main__":
    main()
