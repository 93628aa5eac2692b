"""A saved training run: what `MoQOptimizer.save` writes and `moq export` reads.

A run is a Hugging Face directory (config, simulated weights, tokenizer files) with two files more:
``masters.safetensors``, the full-precision values of the quantized parameters, and ``run.json``,
their grids and the history of the training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from moq import _C
from moq.export import save_generation_config, save_tokenizer
from moq.exported_model import ExportedModel
from moq.manifest import CONFIG_NAME, FormatError, read_json, write_json
from moq.quantized_parameter import QuantizedParameter
from moq.staging import recover, replaced_directory

RUN_NAME = "run.json"
MASTERS_NAME = "masters.safetensors"
RUN_VERSION = 1

# Fields of a QuantizedParameter that run.json keeps as they are.
_PLAIN_FIELDS = (
    "num_bits",
    "mode",
    "granularity",
    "group_size",
    "transposed",
    "activations",
)


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
) -> Path:
    """Writes a run; an older run at the same place is replaced as a whole.

    Args:
        directory: the directory to create or to replace.
        model: a Hugging Face model, holding its simulated weights.
        quantized: its quantized parameters.
        tokenizer: as in `moq.export.export_checkpoint`.
        history: JSON values, kept as they are.

    Returns:
        The directory.

    Raises:
        ValueError: if the model has no Hugging Face config, so that nobody could rebuild it; or if
            `directory` holds anything but a run.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            "save: a run needs a Hugging Face model, whose config rebuilds it, got "
            f"{type(model).__name__}: export it from the training script instead"
        )
    target = Path(directory)
    if target.exists() and any(target.iterdir()) and not (target / RUN_NAME).exists():
        raise ValueError(f"{target}: expected a new directory or a saved run, got other files")
    exported = ExportedModel(model, quantized)
    with replaced_directory(target) as staged:
        stored = [(n, value) for n, value in exported.state.items() if n not in exported.aliases]
        _C.write_safetensors(str(staged / "model.safetensors"), stored, {"format": "pt"})
        masters = [(name, p.master.detach()) for name, p in exported.quantized.items()]
        _C.write_safetensors(str(staged / MASTERS_NAME), masters, {"format": "pt"})
        write_json(staged / CONFIG_NAME, exported.config({}))
        save_generation_config(staged, model)
        save_tokenizer(staged, tokenizer)
        run = {
            "run_version": RUN_VERSION,
            "quantized": {name: _describe(p) for name, p in exported.quantized.items()},
            "history": dict(history or {}),
        }
        write_json(staged / RUN_NAME, run)
    return target


def _describe(parameter: QuantizedParameter) -> dict[str, Any]:
    entry: dict[str, Any] = {field: getattr(parameter, field) for field in _PLAIN_FIELDS}
    scale_dtype = parameter.scale_dtype or parameter.simulated.dtype
    return entry | {"scale_dtype": str(scale_dtype).removeprefix("torch.")}


def load_run(directory: str | os.PathLike[str]) -> SavedRun:
    """Reads a run.

    Raises:
        FormatError: naming file and key, if the directory holds no run of a known version.
        moq._C.Error: if a safetensors file is not one.
    """
    recover(directory)
    path = Path(directory)
    run = read_json(path / RUN_NAME)
    if run.get("run_version") != RUN_VERSION:
        raise FormatError(
            f"{path / RUN_NAME}: run_version must be {RUN_VERSION}, got {run.get('run_version')!r}"
        )
    architecture = read_json(path / CONFIG_NAME)["architectures"][0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise FormatError(
            f"{path / CONFIG_NAME}: architectures must name a class of transformers, got "
            f"{architecture}: export the run from the script that trained it"
        )
    model = model_class.from_pretrained(path, dtype="auto", local_files_only=True)
    state = model.state_dict()
    masters = _C.read_safetensors(str(path / MASTERS_NAME))
    quantized = []
    for name, entry in run["quantized"].items():
        if name not in masters or name not in state:
            raise FormatError(f"{path / MASTERS_NAME}: {name}: expected by {RUN_NAME}, missing")
        scale_dtype = getattr(torch, entry["scale_dtype"])
        fields = {field: entry[field] for field in _PLAIN_FIELDS}
        quantized.append(
            QuantizedParameter(name, masters[name], state[name], scale_dtype=scale_dtype, **fields)
        )
    return SavedRun(model, quantized, run["history"], path)
