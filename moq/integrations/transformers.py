"""MoQOptimizer inside transformers' Trainer.

Example::

    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW(model.parameters(), lr=2e-5), model, "moq.yaml",
        total_steps=num_training_steps(args, train_dataset),
    )
    trainer = Trainer(model, args, train_dataset=train_dataset, optimizers=(optimizer, None))
    attach(trainer, export="out/model")
    trainer.train()
"""

from __future__ import annotations

import math
import os
from collections.abc import Sized
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from moq.caller_warning import warn_caller
from moq.integrations import Training, unwrap_optimizer


def num_training_steps(args: TrainingArguments, train_dataset: Sized) -> int:
    """Returns the optimizer steps that Trainer will make, which MoQOptimizer must know first.

    Args:
        args: The arguments that Trainer will get.
        train_dataset: The dataset that Trainer will get; it must have a length, unless
            `args.max_steps` is set.

    Raises:
        ValueError: if neither is given.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    if not hasattr(train_dataset, "__len__"):
        raise ValueError(
            "num_training_steps: args.max_steps must be set for a dataset without a length, got "
            f"{args.max_steps}"
        )
    share = args.train_batch_size * args.world_size
    whole = len(train_dataset) // share if args.dataloader_drop_last else None
    batches = math.ceil(len(train_dataset) / share) if whole is None else whole
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return int(math.ceil(args.num_train_epochs * per_epoch))


def attach(
    trainer: Trainer,
    *,
    layers: bool = False,
    export: str | os.PathLike[str] | None = None,
) -> MoQCallback:
    """Adds a MoQCallback to a Trainer, before the callbacks that report.

    Args:
        trainer: Made with ``optimizers=(MoQOptimizer, scheduler or None)``.
        layers: Report the scalars of every block, not only those of the model.
        export: Directory to export the model to at the end of the training, with the tokenizer of
            the Trainer.

    Raises:
        TypeError: if the Trainer has no MoQOptimizer.
    """
    if trainer.optimizer is None:
        raise TypeError("attach: Trainer must be made with optimizers=(MoQOptimizer, …), got none")
    callback = MoQCallback(
        trainer.optimizer, layers=layers, export=export, tokenizer=trainer.processing_class
    )
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class MoQCallback(TrainerCallback):
    """Checks, reports and exports; see `attach`, which puts it where reports pass through it.

    Trainer's own checkpoints hold all of the optimizer's state, and resuming from one is
    bit-identical. At the begin of a training this callback refuses a schedule that was made for
    another number of steps, and a checkpoint without the optimizer's file. When Trainer logs, it
    adds the newest of the optimizer's scalars.

    Args:
        optimizer: The MoQOptimizer.
        layers: As in `attach`.
        export: As in `attach`.
        tokenizer: Written beside the exported model.
    """

    def __init__(
        self,
        optimizer: object,
        *,
        layers: bool = False,
        export: str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Makes this callback one of the optimizer's loggers."""
        self.training = Training(
            unwrap_optimizer(optimizer),
            "Trainer",
            layers=layers,
            export=export,
            tokenizer=tokenizer,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses steps that are not those of the schedule."""
        self.training.begin(state.global_step, state.max_steps)
        if args.save_only_model and args.save_strategy != "no":
            warn_caller(
                "MoQOptimizer: save_only_model leaves the full-precision masters and the schedule "
                "out of checkpoints: no training can be resumed from them"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds scalars to what Trainer reports and keeps of a step of training."""
        if logs is None or "loss" not in logs:
            return
        fresh = self.training.take()
        if fresh is not None:
            logs.update(fresh[1])
            state.log_history[-1].update(fresh[1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Exports, if that was asked for."""
        self.training.end()
