"""Writes what was trained: integers, scales, and the proof that they are the trained numbers."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import moq
from moq import _C
from moq.exported_model import ExportedModel
from moq.logit_probe import measure_probe
from moq.manifest import (
    CONFIG_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SUMS_NAME,
    list_files,
    read_sums,
    tensor_sha256,
    write_json,
    write_sums,
)
from moq.progress import track
from moq.quantized_parameter import QuantizedParameter
from moq.record import without_times
from moq.staging import replaced_directory, require_replaceable
from moq.tokenizer_files import TOKENIZER_FILES, has_tokenizer

__all__ = ["QuantizedParameter", "export_checkpoint", "require_exportable"]


def export_checkpoint(
    directory: str | os.PathLike[str],
    model: torch.nn.Module,
    quantized: Sequence[QuantizedParameter],
    *,
    tokenizer: Any = None,
    history: Mapping[str, Any] | None = None,
    probe: Sequence[int] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Writes a trained model as a checkpoint directory; docs/FORMAT.md describes its files.

    Every quantized weight is checked: the numbers that readers compute from the stored codes are
    the simulated weights bit for bit, or nothing is written. The directory is replaced as a whole;
    killed at any moment, it holds the complete old checkpoint or the complete new one.

    Args:
        directory: the directory to create, or a moq checkpoint to replace.
        model: the model, holding its simulated weights. A Hugging Face model's config and
            generation config are written along.
        quantized: the trained parameters, each of the model's and each once. The others are stored
            in their own dtype.
        tokenizer: a tokenizer to save, the directory of a model whose tokenizer files are copied,
            or None.
        history: what happened in training (schedule, sensitivities, seed, steps, …); JSON values,
            kept in moq.json as they are, but for the wall times of measurements.
        probe: token ids whose FP32 logits `moq verify` replays; None: 16 ids spread over the
            vocabulary.
        max_shard_size: bytes after which a new file is begun.

    Returns:
        The directory.

    Raises:
        moq.Error: naming the parameter, if a weight is NaN or infinite, or if a simulated weight
            is not what the stored codes give.
        ValueError: naming the parameter, if it is not the model's, is given twice, or differs in
            dtype from the others; or if `directory` holds files that are not a checkpoint's.
    """
    target = Path(directory)
    parameters = ExportedModel(model, quantized)
    with replaced_directory(target, _own_files) as staged:
        tensors, weights = parameters.convert()
        _write_shards(staged, tensors, max_shard_size)
        config = parameters.config(weights)
        write_json(staged / CONFIG_NAME, config)
        save_tokenizer(staged, tokenizer)
        save_generation_config(staged, model)
        answer, reason = measure_probe(
            model, probe, parameters.exact_state(), parameters.input_grids(weights)
        )
        manifest = {
            "format_version": FORMAT_VERSION,
            "written_by": {
                "moq": moq.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "scale_convention": "real = weight_scale * (code - zero_point)",
            "weights": {name: weight.to_dict() for name, weight in weights.items()},
            "tensors": {
                name: {"sha256": tensor_sha256(tensor)} for name, tensor in tensors.items()
            },
            "aliases": parameters.aliases,
            "history": without_times(history or {}),
            "probe": answer,
            "no_probe": reason,
        }
        write_json(staged / MANIFEST_NAME, manifest)
        write_sums(staged, list_files(staged))
    return target


def require_exportable(directory: str | os.PathLike[str]) -> None:
    """Refuses a directory that `export_checkpoint` would refuse.

    Raises:
        OSError: if the file system refuses.
        ValueError: if it holds files that are not a checkpoint's.
    """
    require_replaceable(directory, _own_files)


def _own_files(target: Path) -> set[str]:
    """The files of a checkpoint; none if `target` is something else."""
    if not (target / SUMS_NAME).exists():
        return set()
    names = {SUMS_NAME, *read_sums(target)}
    return names if MANIFEST_NAME in names else set()


def _write_shards(
    directory: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: int
) -> None:
    """Writes model.safetensors, or numbered shards and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        for index in range(1, len(shards) + 1)
    ]
    for name, shard in track(list(zip(names, shards, strict=True)), "writing"):
        _C.write_safetensors(str(directory / name), list(shard.items()), {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {
                key: name for name, shard in zip(names, shards, strict=True) for key in shard
            },
        }
        write_json(directory / "model.safetensors.index.json", index)


def save_generation_config(directory: Path, model: torch.nn.Module) -> None:
    """Saves a Hugging Face model's generation defaults, if it has any."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        config.save_pretrained(directory)


def save_tokenizer(directory: Path, tokenizer: Any) -> None:
    """Saves a tokenizer object, or copies the tokenizer files of a model's directory.

    Raises:
        ValueError: if the directory has none.
    """
    if tokenizer is None:
        return
    if not isinstance(tokenizer, (str, os.PathLike)):
        tokenizer.save_pretrained(directory)
        return
    source = Path(tokenizer)
    if not has_tokenizer(source):
        raise ValueError(f"{source}: expected a directory with tokenizer files, got none")
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
