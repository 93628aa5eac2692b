"""`moq report RUN -o report.html`: one page that shows what happened in a training."""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moq.directory_kind import RUN_NAME
from moq.report_data import read_record
from moq.report_page import Front, page
from moq.report_weights import front_of, weigh
from moq.saved_run import load_run

EPILOG = """\
The page needs no network and no other file. It shows the plan against what happened, bits per
layer over time, sensitivities and their cost, the Pareto front of target bits, sizes, and what was
logged: losses, accuracies, quantization error, flips. A section without data says how to get it.

  optimizer = moq.MoQOptimizer(..., loggers=CsvLogger("moq.csv"))   # figures over the steps
  optimizer.probe(loss_fn, batches)                                 # sensitivities, the front
  optimizer.log({"loss": loss, "accuracy": accuracy})               # figures of your own
  optimizer.save("out/run")

  moq report out/run -o report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `moq report`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "run", metavar="RUN", help="directory that optimizer.save wrote, finished or not"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="HTML file to write or to replace"
    )
    parser.add_argument(
        "--scalars",
        metavar="CSV",
        help="file of a CsvLogger, instead of the copy in RUN",
    )


def run(options: argparse.Namespace) -> int:
    """Runs `moq report`."""
    output = Path(options.output)
    _require_writable(output)
    text = report(options.run, options.scalars)
    _replace(output, text)
    print(f"{output}: {len(text.encode()) / 1e3:.0f} kB; open it in a browser")
    return 0


def report(directory: str | os.PathLike[str], scalars: str | os.PathLike[str] | None = None) -> str:
    """Renders the report of a saved run.

    Args:
        directory: The run.
        scalars: File of a CsvLogger; None takes the copy in the run, if there is one.

    Raises:
        FormatError: naming file and key, if the directory holds no run or a file is damaged.
        moq.Error: if a safetensors file is damaged.
    """
    record = read_record(directory, scalars)
    saved = load_run(directory)
    front: Front | str
    if any(probe.measure in ("trace", "both") for probe in record.probes):
        front = front_of(saved, record)
    else:
        front = (
            "It needs traces of the layers, and this run has "
            + ("eigenvalues only" if record.probes else "no measurement")
            + ': call `optimizer.probe(loss_fn, batches, measure="trace")` and save the run.'
        )
    when = datetime.fromtimestamp((Path(directory) / RUN_NAME).stat().st_mtime)
    written_by = f"Run `{directory}`, saved {when:%Y-%m-%d %H:%M}; page by moq {_version()}."
    return page(record, weigh(saved, record.blocks), front, written_by)


def _require_writable(output: Path) -> None:
    """Refuses an output that cannot be written, before the work is done.

    Raises:
        ValueError: naming what is in the way.
    """
    if output.is_dir():
        raise ValueError(f"{output}: must be a file, got a directory: -o {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: the directory {output.parent} must exist: mkdir -p it first")


def _replace(output: Path, text: str) -> None:
    """Writes a file as a whole: readers see the old one or the new one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0o022)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, output)
    except BaseException:
        os.unlink(name)
        raise


def _version() -> str:
    try:
        return version("torch-moq")
    except PackageNotFoundError:  # a checkout on the path
        return "(not installed)"
