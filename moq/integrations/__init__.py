"""MoQOptimizer inside transformers' Trainer, Lightning and accelerate.

None of them needs this package to train: they take a MoQOptimizer as they take any optimizer. What
is here checks that the tool and the schedule mean the same steps, hands scalars to the tool's own
loggers, and exports at the end. Each module imports its tool; this one imports none.
"""

from __future__ import annotations

import os
from typing import Any

from moq.before_writing import require_equal_ranks
from moq.caller_warning import warn_caller
from moq.collective import raise_together
from moq.optimizer import MoQOptimizer


def unwrap_optimizer(optimizer: object) -> MoQOptimizer:
    """Returns the MoQOptimizer in what accelerate or Lightning made of it.

    Raises:
        TypeError: if there is none inside.
    """
    inner: Any = optimizer
    # Lightning's wrapper passes itself off as an instance of the class that it wraps.
    while type(inner) is not MoQOptimizer:
        for name in ("optimizer", "_optimizer"):
            if name in getattr(inner, "__dict__", {}):
                inner = inner.__dict__[name]
                break
        else:
            if isinstance(inner, MoQOptimizer):
                return inner
            raise TypeError(
                "moq: the optimizer must be a MoQOptimizer, or wrapped around one, got "
                f"{type(optimizer).__name__}"
            )
    return inner


class Training:
    """What the callbacks of two tools do alike: one optimizer from the first step to the last.

    Args:
        optimizer: The optimizer.
        tool: Name of the tool, for messages.
        layers: Give the tool the scalars of every block, not only those of the model.
        export: Directory to export to at the end.
        tokenizer: Written beside the exported model.
    """

    def __init__(
        self,
        optimizer: MoQOptimizer,
        tool: str,
        *,
        layers: bool = False,
        export: str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Makes this object one of the optimizer's loggers."""
        self.optimizer = optimizer
        self.tool = tool
        self.layers = layers
        self.export = export
        self.tokenizer = tokenizer
        self._fresh: tuple[int, dict[str, float]] | None = None
        optimizer.add_logger(self)

    def log(self, scalars: dict[str, float], *, step: int) -> None:
        """Keeps scalars until the tool logs next."""
        if not self.layers:
            scalars = {name: value for name, value in scalars.items() if name.count("/") == 1}
        if scalars:
            kept = self._fresh[1] if self._fresh and self._fresh[0] == step else {}
            self._fresh = step, kept | scalars

    def take(self) -> tuple[int, dict[str, float]] | None:
        """Returns the newest scalars and their step, once."""
        fresh, self._fresh = self._fresh, None
        return fresh

    def begin(self, made: int, planned: float) -> None:
        """Refuses a training whose steps are not those of the schedule.

        Args:
            made: Optimizer steps that the tool has made, which a resumed training had made before.
            planned: Optimizer steps of the whole training; infinite if the tool does not know.

        Raises:
            ValueError: if the schedule was made for another number of steps, or if the directory to
                export to holds something else.
            OSError: if that cannot be written.
            RuntimeError: if the optimizer has not made the steps that the tool has, if ranks
                hold different weights, or if shards are to be exported.
        """
        with raise_together():
            self._require_same_steps(made, planned)
        if self.export is not None:
            self.optimizer.require_exportable(self.export)
        self._require_equal_ranks(
            f"begin with the same weights, got different ones: {self.tool} broadcasts the "
            "simulated weights, not the full-precision masters. Load or seed the model alike on "
            "all ranks before MoQOptimizer is made"
        )

    def end(self) -> None:
        """Flushes the loggers, says what did not arrive, and exports.

        A training may end early, or lose steps to overflows.

        Raises:
            RuntimeError: if ranks hold different weights; then nothing is exported.
        """
        with raise_together():
            self.optimizer.flush_logs()
        self._require_equal_ranks(
            "end with the same weights, got different ones, as when nothing averages the "
            f"gradients: {self.tool} or the model must do it for all parameters of the optimizer"
        )
        schedule, steps = self.optimizer.schedule(), self.optimizer.steps
        above = [
            name
            for block, name in enumerate(schedule.block_names)
            if schedule.bits_at(block, steps) != schedule.plan()[block][-1][1]
        ]
        if above and steps < self.optimizer.total_steps:
            warn_caller(
                f"MoQOptimizer: the training ended after {steps} of {schedule.total_steps} steps, "
                f"and {', '.join(above[:3])}{', …' if above[3:] else ''} had not reached the "
                "target width"
            )
        if self.export is not None:
            self.optimizer.export(self.export, tokenizer=self.tokenizer)

    def _require_same_steps(self, made: int, planned: float) -> None:
        total, steps = self.optimizer.total_steps, self.optimizer.steps
        if planned not in (total, float("inf")):
            raise ValueError(
                f"MoQOptimizer: total_steps must be the {planned} optimizer steps that {self.tool} "
                f"will make, got {total}"
            )
        if made > 0 and steps == 0:
            raise RuntimeError(
                f"MoQOptimizer: {self.tool} resumes at step {made}, and the optimizer's state was "
                "not in its checkpoint: the full-precision masters and the schedule are lost. Save "
                "whole checkpoints, or begin a new training from these weights"
            )
        if steps > made:
            raise RuntimeError(
                f"MoQOptimizer: {self.tool} begins at step {made}, and the optimizer has made "
                f"{steps} already: make a new MoQOptimizer for each training"
            )

    def _require_equal_ranks(self, rule: str) -> None:
        require_equal_ranks(self.optimizer.fingerprint(), None, rule)
