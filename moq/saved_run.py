"""A saved training run: what `MoQOptimizer.save` writes and `moq export` reads.

A run is a Hugging Face directory (config, simulated weights, tokenizer files) with these files
more: ``masters.safetensors``, the full-precision values of the quantized parameters; ``run.json``,
their grids and the history of the training; ``scalars.csv``, what a CsvLogger heard of it, if the
training had one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from moq import _C
from moq.directory_kind import MASTERS_NAME, RUN_NAME, require_run
from moq.export import save_generation_config, save_tokenizer
from moq.exported_model import ExportedModel, refuse_nonfinite
from moq.manifest import CONFIG_NAME, FormatError, read_json, write_json
from moq.quantized_parameter import QuantizedParameter
from moq.staging import files_below, recover, replaced_directory, replaced_file
from moq.strict import Strict

SCALARS_NAME = "scalars.csv"
RUN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class _Entry(Strict):
    """What run.json says about a parameter: the fields of QuantizedParameter beside its tensors."""

    num_bits: int
    mode: str
    granularity: str
    group_size: int
    transposed: bool
    activations: str | None
    scale: str
    input_scale: float | None
    input_zero_point: int | None = None
    scale_dtype: Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class SavedRun:
    """A run read back.

    Attributes:
        model: the model, holding its simulated weights.
        quantized: its quantized parameters, with both values.
        history: what `save_run` was given.
        directory: where it was read from; holds the tokenizer files, if any were saved.
    """

    model: torch.nn.Module
    quantized: list[QuantizedParameter]
    history: dict[str, Any]
    directory: Path


def save_run(
    directory: str | os.PathLike[str],
    model: torch.nn.Module,
    quantized: Sequence[QuantizedParameter],
    *,
    tokenizer: Any = None,
    history: Mapping[str, Any] | None = None,
    scalars: Path | None = None,
    pace: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a run; an older run at the same place is replaced as a whole.

    Args:
        directory: the directory to create or to replace.
        model: a Hugging Face model, holding its simulated weights.
        quantized: its quantized parameters.
        tokenizer: as in `moq.export.export_checkpoint`.
        history: JSON values, kept as they are.
        scalars: file of a CsvLogger, to keep a copy of.
        pace: `moq.record.Pace.to_dict()`; apart from the history, which exported checkpoints hold
            too, without the wall times of measurements: the same training with the same
            measurements exports the same bytes at any speed.

    Returns:
        The directory.

    Raises:
        ValueError: if the model has no Hugging Face config, so that nobody could rebuild it; or if
            `directory` holds a file that is not a run's.
        moq.Error: naming the parameter, if a weight or master is NaN or infinite; an older run
            stays.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            "save: a run needs a Hugging Face model, whose config rebuilds it, got "
            f"{type(model).__name__}: export it from the training script instead"
        )
    target = Path(directory)
    exported = ExportedModel(model, quantized)
    stored = [(n, value) for n, value in exported.state.items() if n not in exported.aliases]
    masters = [(name, p.master.detach()) for name, p in exported.quantized.items()]
    masters += [
        (f"{name}_absmax", p.absmax.detach())
        for name, p in exported.quantized.items()
        if p.absmax is not None
    ]
    for name, value in masters + stored:  # the older run may be the last good one
        refuse_nonfinite(name, value)
    with replaced_directory(target, _own_files) as staged:
        _C.write_safetensors(str(staged / "model.safetensors"), stored, {"format": "pt"})
        _C.write_safetensors(str(staged / MASTERS_NAME), masters, {"format": "pt"})
        write_json(staged / CONFIG_NAME, exported.config({}))
        save_generation_config(staged, model)
        save_tokenizer(staged, tokenizer)
        if scalars is not None and scalars.exists():
            shutil.copyfile(scalars, staged / SCALARS_NAME)
        run = {
            "run_version": RUN_VERSION,
            "quantized": {name: _describe(p) for name, p in exported.quantized.items()},
            "history": dict(history or {}),
            "pace": dict(pace or {}),
            "files": [RUN_NAME, *files_below(staged)],
        }
        write_json(staged / RUN_NAME, run)
    return target


def read_history(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_run` was given as history, and nothing else.

    Raises:
        FormatError: if the directory holds no run of a known version.
    """
    history: dict[str, Any] = read_run(Path(directory))["history"]
    return history


def record(directory: str | os.PathLike[str], key: str, value: Any) -> None:
    """Puts one JSON value into the history of a run, at once or not at all.

    Args:
        directory: what `save_run` wrote.
        key: of the history; an older value is replaced.
        value: JSON.

    Raises:
        FormatError: if the directory holds no run of a known version.
        OSError: if the file system refuses.
    """
    recover(directory)
    with replaced_file(directory, RUN_NAME) as staged:
        run = read_run(Path(directory))
        run["history"][key] = value
        write_json(staged, run)


def _own_files(target: Path) -> list[str]:
    """The files of a run; none if `target` is something else."""
    return read_run(target)["files"] if (target / RUN_NAME).exists() else []


def _describe(parameter: QuantizedParameter) -> dict[str, Any]:
    fields = {name: getattr(parameter, name) for name in _Entry.keys()}
    scale_dtype = parameter.scale_dtype or parameter.simulated.dtype
    fields["scale_dtype"] = str(scale_dtype).removeprefix("torch.")
    return _Entry(**fields).to_dict()


def load_run(directory: str | os.PathLike[str]) -> SavedRun:
    """Reads a run.

    Raises:
        FormatError: naming file and key, if the directory holds no run of a known version.
        moq.Error: if a safetensors file is not one.
    """
    recover(directory)
    path = Path(directory)
    run = read_run(path)
    model_class = _model_class(path / CONFIG_NAME)
    with _without_progress_bar():
        model = model_class.from_pretrained(path, dtype="auto", local_files_only=True)
    state = model.state_dict()
    masters = _C.read_safetensors(str(path / MASTERS_NAME))
    quantized = []
    for name, entry in run["quantized"].items():
        if name not in masters or name not in state:
            raise FormatError(f"{path / MASTERS_NAME}: {name}: expected by {RUN_NAME}, missing")
        absmax = masters.get(f"{name}_absmax")
        quantized.append(
            _parameter(name, entry, masters[name], state[name], absmax, path / RUN_NAME)
        )
    return SavedRun(model, quantized, run["history"], path)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing its own on standard error, for what takes a moment."""
    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_run(directory: Path) -> dict[str, Any]:
    """Reads run.json of a version that this release knows.

    Raises:
        FormatError: naming file and key, if there is none, or none of such a version.
    """
    require_run(directory)
    path = directory / RUN_NAME
    run = read_json(path)
    if run.get("run_version") != RUN_VERSION:
        raise FormatError(
            f"{path}: run_version must be {RUN_VERSION}, got {run.get('run_version')!r}"
        )
    for key, kind, words in (
        ("quantized", dict, "an object"),
        ("history", dict, "an object"),
        ("files", list, "a list"),
    ):
        if not isinstance(run.get(key), kind):
            raise FormatError(f"{path}: {key} must be {words}, got {run.get(key)!r}")
    return run


def _model_class(config: Path) -> Any:
    """The class of transformers that config.json names."""
    architectures = read_json(config).get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None:
        raise FormatError(
            f"{config}: architectures must name a class of transformers, got {architectures!r}: "
            "export the run from the script that trained it"
        )
    return model_class


def _parameter(
    name: str,
    entry: object,
    master: torch.Tensor,
    simulated: torch.Tensor,
    absmax: torch.Tensor | None,
    path: Path,
) -> QuantizedParameter:
    """One parameter of a run, from its entry in run.json."""
    try:
        fields = _Entry.from_dict(entry, "quantized").to_dict()
        fields["scale_dtype"] = getattr(torch, fields["scale_dtype"])
        return QuantizedParameter(name, master, simulated, absmax=absmax, **fields)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {name}: {error}") from error
