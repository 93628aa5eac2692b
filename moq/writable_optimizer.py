"""What leaves a training: figures for loggers, saved runs, exported checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moq.activations import ActivationQuantizers
from moq.before_writing import require_equal_ranks
from moq.caller_warning import warn_caller
from moq.collective import raise_together
from moq.loggers import Logger
from moq.planned_optimizer import PlannedOptimizer
from moq.record import Pace, Record
from moq.replaced import require_in_model
from moq.reporting import is_main_process
from moq.rules import plain_name
from moq.scalars import require_logger

if TYPE_CHECKING:
    from moq.quantized_parameter import QuantizedParameter


class WritableOptimizer(PlannedOptimizer):
    """What MoQOptimizer tells loggers of its training, and what it writes to directories."""

    _activations: ActivationQuantizers
    _pace: Pace
    _blank_state: bool

    def log(self, figures: Mapping[str, float | torch.Tensor]) -> None:
        """Tells the loggers figures of your own at the present step: a loss, an accuracy.

        ``moq report`` draws them over the steps if one of the loggers is a CsvLogger. Rank 0 tells
        its own; without loggers nothing happens. A tensor on a GPU is told later, and nothing waits
        for it.

        Args:
            figures: Numbers or tensors of one number, by names that do not begin with ``moq/``.

        Raises:
            TypeError: for a value that is no number.
            ValueError: for another name, or a tensor of several numbers.

        Example:
            >>> optimizer.log({"loss": loss, "accuracy": 0.781})
        """
        self._scalars.add(figures, self._masters)

    def flush_logs(self) -> None:
        """Tells the loggers what has been measured and has not reached them yet; waits for it.

        Drops of the last steps on a GPU, of which the host has not heard, are printed too.
        """
        self._reporter.drops(self._masters.trainer, wait=True)
        self._scalars.deliver(self._masters, wait=True)

    def add_logger(self, logger: Logger) -> None:
        """Tells one more logger from now on.

        Raises:
            TypeError: if it has no method ``log``.
        """
        require_logger(logger)
        self._scalars.loggers.append(logger)

    def fingerprint(self) -> str:
        """Returns a short text that differs between ranks whose masters or plans differ.

        With sharded parameters it is the same on all ranks: each holds another part.
        """
        return self._masters.fingerprint()

    def quantized_parameters(self) -> list[QuantizedParameter]:
        """Returns every quantized parameter with both its values, as `moq.export` takes them.

        With sharded parameters this gathers them: all ranks must call it.

        Raises:
            RuntimeError: inside `full_precision`, or if a weight still blends with its master.
        """
        self._require_simulated("quantized_parameters")
        return self._masters.export(self._activations)

    def save(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes the run: model, masters, widths, schedule and measurements, without pickle.

        ``moq export DIRECTORY`` makes of it what `export` makes, ``moq report DIRECTORY`` a page
        about the training, with what a CsvLogger heard of it. All ranks must call it; rank 0
        writes, the others wait.

        Args:
            directory: Complete after the call, or as it was before.
            tokenizer: A transformers tokenizer to write beside the model.

        Raises:
            RuntimeError: as `quantized_parameters`; if parameters are sharded, no longer those of
                the model, or different on other ranks; or if rank 0 failed.
            moq.Error: naming the parameter, if a weight or master is NaN or infinite.
            ValueError: if the model is not a transformers model, whose config can rebuild it, or if
                the directory holds something else already.
        """
        from moq.saved_run import save_run

        write = partial(save_run, scalars=self._scalars.file(), pace=self._pace.to_dict())
        self._write(write, directory, tokenizer, first=self.flush_logs)

    def export(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes the model as a checkpoint directory of integers and scales.

        All ranks must call it; rank 0 writes, the others wait.

        Args:
            directory: Complete after the call, or as it was before.
            tokenizer: A transformers tokenizer to write beside the model.

        Raises:
            RuntimeError: as `save`.
            moq.Error: naming the parameter, if a weight or master is NaN or infinite.
            ValueError: if the directory holds something else already.

        Warns:
            UserWarning: if some weights have not fallen to their target width yet.
        """
        from moq.export import export_checkpoint

        self._write(export_checkpoint, directory, tokenizer, first=self._warn_of_early_export)

    def require_exportable(self, directory: str | os.PathLike[str]) -> None:
        """Refuses, before a long training, a directory that `export` could not write at its end.

        All ranks must call it; rank 0 looks at the directory.

        Raises:
            OSError: if the file system refuses.
            RuntimeError: if parameters are sharded, or if rank 0 failed.
            ValueError: if the directory holds something else already.
        """
        from moq.export import require_exportable

        self._require_whole()
        with raise_together():
            if is_main_process():
                require_exportable(directory)

    def _write(
        self,
        write: Callable[..., Any],
        directory: str | os.PathLike[str],
        tokenizer: Any,
        *,
        first: Callable[[], None],
    ) -> None:
        """Hands what was trained to a writer of directories, on rank 0, after another task."""
        self._require_whole()
        with raise_together():
            first()
            require_in_model(self._masters.matched, self.model)
            quantized = self.quantized_parameters()
        with raise_together():  # ranks of other groups would wait
            require_equal_ranks(
                self.fingerprint(),
                self._activations.process_group,
                "hold the same weights to be written, got different ones, as when nothing averages "
                "the gradients, or when the model was not the same on all ranks before "
                "MoQOptimizer was made (DistributedDataParallel made afterwards broadcasts the "
                "simulated weights, not the full-precision masters); ranks that train another "
                "model, or a part, need MoQOptimizer(process_group=…)",
            )
        with raise_together():
            if is_main_process():
                history = self._record().summary()
                write(directory, self.model, quantized, tokenizer=tokenizer, history=history)

    def _require_whole(self) -> None:
        """Refuses to write shards."""
        if self._masters.sharded:
            raise RuntimeError(
                "MoQOptimizer: the model must be whole to be written, got sharded parameters: save "
                "with torch.distributed.checkpoint, resume in one process and write from there"
            )

    def _warn_of_early_export(self) -> None:
        """Says which weights are exported before they have their target width."""
        widths, plan = self.num_bits, self.schedule().plan()
        early = [
            f"{m.name} at {widths[m.name]} of {plan[block][-1][1]} bits"
            for m, block in self._masters.placed()
            if widths[m.name] > plan[block][-1][1]
        ]
        if early and is_main_process():
            remedy = "Train on until all have it: print(optimizer.schedule()) shows when"
            if self.steps == 0:
                remedy = (
                    "A step counts if MoQOptimizer makes it, not the optimizer inside, and if "
                    "there are gradients: backward() must be called between zero_grad() and step()"
                )
            warn_caller(
                f"MoQOptimizer.export: {len(early)} of {len(widths)} weights have not reached "
                f"their target after {self.steps} steps ({early[0]}): they are written at the "
                f"width that they have, above 8 bits in the model's dtype. {remedy}"
            )

    def _record(self) -> Record:
        """Says what the state dict says beside tensors."""
        names = {id(p): plain_name(name) for name, p in self.model.named_parameters()}
        return Record(
            step=self.steps,
            seed=self.config.seed,
            parameters=self._masters.describe(),
            names=[[names.get(id(p), "") for p in group["params"]] for group in self.param_groups],
            schedule=self.schedule().state_dict(),
            history=self.history,
            blank_state=self._blank_state,
            activations=self._activations.state(),
            target_bits=self._target_bits,
            probes=self._probes.saved(),
        )
