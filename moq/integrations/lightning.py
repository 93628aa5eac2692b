"""MoQOptimizer inside Lightning.

Example::

    class Module(lightning.LightningModule):
        def configure_optimizers(self):
            return moq.MoQOptimizer(
                torch.optim.AdamW(self.parameters(), lr=2e-5), self, "moq.yaml",
                total_steps=self.trainer.estimated_stepping_batches,
            )

    lightning.Trainer(callbacks=[MoQCallback(export="out/model")]).fit(Module(), loader)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moq import MoQOptimizer
from moq.caller_warning import warn_caller
from moq.integrations import Training, unwrap_optimizer
from moq.simulators import LEARNED_SCALE


class MoQCallback(Callback):
    """Checks, reports and exports.

    Lightning's own checkpoints hold all of the optimizer's state, and resuming from one is
    bit-identical. At the begin of a training this callback refuses a schedule that was made for
    another number of steps. It gives the optimizer's scalars to the Trainer's loggers.

    Args:
        layers: Report the scalars of every block, not only those of the model.
        export: Directory to export the model to at the end of the training.
        tokenizer: Written beside the exported model.
    """

    def __init__(
        self,
        *,
        layers: bool = False,
        export: str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Waits for the training: its optimizer is made by the LightningModule."""
        self._options = {"layers": layers, "export": export, "tokenizer": tokenizer}
        self.training: Training | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses steps that are not those of the schedule, and scales that ranks do not share."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                "MoQCallback: the module must configure one optimizer, a MoQOptimizer, got "
                f"{len(trainer.optimizers)}"
            )
        self.training = Training(
            unwrap_optimizer(trainer.optimizers[0]), "Lightning", **self._options
        )
        _require_gradients_reduced(self.training.optimizer, trainer.strategy.model)
        self.training.begin(trainer.global_step, trainer.estimated_stepping_batches)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                warn_caller(
                    "MoQOptimizer: save_weights_only leaves the full-precision masters and the "
                    "schedule out of checkpoints: no training can be resumed from them"
                )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Gives new scalars to the loggers."""
        self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports, if that was asked for."""
        if self.training is not None:
            self.training.end()
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        fresh = None if self.training is None else self.training.take()
        if fresh is not None:
            for logger in trainer.loggers:
                logger.log_metrics(fresh[1], step=fresh[0])


def _require_gradients_reduced(optimizer: MoQOptimizer, model: object) -> None:
    """Refuses learned scales that DistributedDataParallel knows nothing of.

    Raises:
        ValueError: naming the remedy.
    """
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return
    reduced = {id(parameter) for parameter in model._module_parameters}
    for name, parameter in optimizer.model.named_parameters():
        if id(parameter) not in reduced and name.endswith(LEARNED_SCALE):
            raise ValueError(
                "MoQCallback: DistributedDataParallel must reduce the gradients of learned scales, "
                f"and {name} was made after it: make MoQOptimizer in configure_model, which "
                "Lightning calls first, and return that optimizer from configure_optimizers"
            )
