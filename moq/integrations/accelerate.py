"""MoQOptimizer inside accelerate.

`Accelerator.prepare` takes a MoQOptimizer as it takes any, `save_state` and `load_state` keep all
of it, and an Accelerator is a logger as it is.

Example::

    accelerator = Accelerator(log_with="tensorboard", project_dir="runs")
    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW(model.parameters(), lr=2e-5), model, "moq.yaml",
        total_steps=num_training_steps(accelerator, loader, epochs=3), loggers=accelerator,
    )
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    ...                                     # the loop steps `prepared`
    optimizer.export("out/model")
"""

from __future__ import annotations

import math
from collections.abc import Sized

from accelerate import Accelerator  # type: ignore[import-untyped]

from moq.integrations import unwrap_optimizer

__all__ = ["num_training_steps", "unwrap_optimizer"]


def num_training_steps(accelerator: Accelerator, loader: Sized, epochs: int = 1) -> int:
    """Returns the optimizer steps of a training, which MoQOptimizer must know first.

    Args:
        accelerator: Its gradient accumulation and number of processes count.
        loader: The training's data loader, before `prepare`.
        epochs: Times that the loader is gone through.

    Raises:
        ValueError: if there is nothing to train on.
    """
    processes = 1 if accelerator.split_batches else accelerator.num_processes
    # What is left when the processes have had equally many batches is theirs again, or dropped.
    sampler = getattr(loader, "batch_sampler", None)
    drops_last = getattr(loader if sampler is None else sampler, "drop_last", False)
    batches = len(loader) // processes if drops_last else math.ceil(len(loader) / processes)
    if batches < 1 or epochs < 1:
        raise ValueError(
            f"num_training_steps: loader and epochs must not be empty, got {len(loader)} batches "
            f"and {epochs} epochs on {processes} processes"
        )
    # accelerate makes a step at the end of each epoch, however few batches have accumulated.
    return epochs * math.ceil(batches / int(accelerator.gradient_accumulation_steps))
