"""Where the numbers of a training go: TensorBoard, CSV, or any object with one method."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO, runtime_checkable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@runtime_checkable
class Logger(Protocol):
    """Takes scalars; a run of Weights & Biases and an Accelerator are Loggers as they are."""

    def log(self, scalars: dict[str, float], /, *, step: int) -> object:
        """Takes the scalars of one step.

        Args:
            scalars: Values by name, as ``moq/bits`` or ``moq/bits/model.layers.3``.
            step: Completed optimizer steps.
        """
        ...


class TensorBoardLogger:
    """Writes scalars for TensorBoard.

    Args:
        target: A directory, for which a writer is made, or a SummaryWriter that there is already.

    Raises:
        RuntimeError: if a writer must be made and tensorboard is not installed.
    """

    def __init__(self, target: str | os.PathLike[str] | SummaryWriter) -> None:
        """Opens the directory."""
        if isinstance(target, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RuntimeError(
                    "TensorBoardLogger needs tensorboard: pip install tensorboard"
                ) from error
            target = SummaryWriter(os.fspath(target))
        self.writer = target

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Hands the scalars of one step to the writer, which writes now and then by itself."""
        # Of torch's writer: others, such as tensorboardX's, have one that takes other records.
        own = type(self.writer).__module__.startswith("torch.utils.tensorboard")
        file_writer = self.writer.file_writer if own else None
        if file_writer is None:  # closed, which add_scalar undoes
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            return
        # As add_scalar does, but one record for all: a record takes longer than what is in it.
        from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
            Summary,
        )

        values = [Summary.Value(tag=name, simple_value=v) for name, v in scalars.items()]
        file_writer.add_summary(Summary(value=values), step)

    def flush(self) -> None:
        """Waits until all that has been logged is in the file; MoQOptimizer.flush_logs calls it."""
        self.writer.flush()


class CsvLogger:
    """Writes scalars to a CSV file with the columns step, name, value: one row for each.

    A file that is there already is continued, so that a resumed training goes on in it: what it has
    of the first step that is logged, and of later ones, is dropped, since they are made again.
    `MoQOptimizer.save` keeps a copy in the run, for ``moq report``.

    Args:
        path: The file; its directory is made if it is missing.

    Raises:
        ValueError: if the file has other columns.
    """

    COLUMNS = ("step", "name", "value")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file."""
        self.path = path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a+", newline="", encoding="utf-8")
        self._file.seek(0)
        found = next(csv.reader(self._file), None)
        if found is not None and tuple(found) != self.COLUMNS:
            self._file.close()
            raise ValueError(f"{path}: must have the columns {list(self.COLUMNS)}, got {found}")
        self._writer = csv.writer(self._file)
        self._continues = found is not None

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Writes the scalars of one step, into an empty file after the names of the columns."""
        if self._continues:  # not when it is opened: every rank does that, one logs
            self._continues = False
            self._drop_from(step)
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            self._writer.writerow(self.COLUMNS)
        self._writer.writerows((step, name, repr(value)) for name, value in scalars.items())
        self._file.flush()

    def _drop_from(self, step: int) -> None:
        """Drops the rows of a step and of those after it, and a row that was not written whole."""
        self._file.seek(0)
        rows = list(csv.reader(self._file))
        kept = [rows[0]] + [row for row in rows[1:] if _step_of(row) < step]
        if len(kept) == len(rows):
            return
        # Beside it first: killed at any moment, the file is the old or the new one.
        beside = self.path.with_name(f".{self.path.name}.new")
        with beside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(kept)
        self._file.close()
        os.replace(beside, self.path)
        self._file = self.path.open("a+", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def close(self) -> None:
        """Closes the file; what has been logged is in it after every call already."""
        self._file.close()


def _step_of(row: list[str]) -> float:
    """The step of a row; infinity of what is none, as when the process was killed in writing it."""
    return int(row[0]) if len(row) == len(CsvLogger.COLUMNS) and row[0].isdecimal() else math.inf
