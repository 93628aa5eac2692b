"""`moq inspect DIR`: the bit map and the sizes of a checkpoint."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from moq import _C
from moq.config import BLOCK_PATTERN
from moq.directory_kind import require_checkpoint
from moq.input_grid import is_asymmetric, is_static
from moq.layout import DENSE, stored_weights
from moq.manifest import CONFIG_NAME, list_files, read_json, read_manifest
from moq.staging import recover


def describe_checkpoint(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint directory holds, without touching the weights' bytes.

    Returns:
        ``model`` (architecture, dtype), ``weights`` (per weight matrix: its moq.json entry and its
        ``bytes``), ``other_tensors`` and ``files`` (name -> bytes), ``bytes`` and
        ``dense_bytes`` (what the same tensors take without quantization), ``mean_bits`` (trained,
        over the elements of the quantized matrices), ``history``, ``written_by``.

    Raises:
        moq.manifest.FormatError: if the directory is no checkpoint, or moq.json or config.json is
            not what the format says.
        moq.Error: if a safetensors file is not.
    """
    recover(directory)
    path = Path(directory)
    require_checkpoint(path)
    manifest = read_manifest(path)
    config = read_json(path / CONFIG_NAME)
    checkpoint = _C.Checkpoint(str(path))
    weights = stored_weights(manifest, path)
    described = []
    owned: set[str] = set()
    dense_bytes = 0
    for name, weight in weights.items():
        tensors = weight.tensors()
        owned |= tensors.keys()
        size = sum(checkpoint.info(tensor).size_bytes for tensor in tensors)
        described.append({"name": name, **weight.to_dict(), "bytes": size})
        dense_bytes += math.prod(weight.shape) * (4 if weight.scale_dtype == "float32" else 2)
    other = {
        name: checkpoint.info(name).size_bytes for name in checkpoint.names() if name not in owned
    }
    elements = sum(math.prod(weight.shape) for weight in weights.values())
    bits = sum(math.prod(weight.shape) * weight.trained_bits for weight in weights.values())
    return {
        "directory": str(path),
        "format_version": manifest["format_version"],
        "model": {"architectures": config.get("architectures"), "dtype": config.get("dtype")},
        "weights": described,
        "other_tensors": other,
        "files": {name: (path / name).stat().st_size for name in list_files(path)},
        "bytes": sum(entry["bytes"] for entry in described) + sum(other.values()),
        "dense_bytes": dense_bytes + sum(other.values()),
        "mean_bits": bits / elements if elements else None,
        "history": manifest.get("history", {}),
        "written_by": manifest["written_by"],
    }


def _split(module: str) -> tuple[str, str]:
    """('model.layers.3', 'mlp.up_proj') of a layer's module; (module, '') of any other."""
    found = re.search(BLOCK_PATTERN, module)
    layer = found.group() if found else module
    return layer, module[len(layer) + 1 :]


def _cell(entry: dict[str, Any]) -> str:
    """Trained width, marked where it is not the whole story: 8, 6→8, 4g128, 8a+A8 (INT8 inputs).

    a: asymmetric, t: ternary, b: binary; A8s: static INT8 inputs, A8a: asymmetric ones.
    """
    text = str(entry["trained_bits"])
    if entry["format"] != DENSE and entry["stored_bits"] != entry["trained_bits"]:
        text += f"→{entry['stored_bits']}"
    text += {"asymmetric": "a", "ternary": "t", "binary": "b"}.get(entry["mode"], "")
    if entry["granularity"] == "per_group":
        text += f"g{entry['group_size']}"
    if entry["activations"]:
        text += "+A8" + ("s" if is_static(entry["activations"]) else "")
        text += "a" if is_asymmetric(entry["activations"]) else ""
    return text


def bit_map(description: dict[str, Any]) -> Table:
    """A table with one row per transformer layer and one column per weight of a layer."""
    rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    columns: dict[str, None] = {}
    for entry in description["weights"]:
        row, column = _split(entry["module"])
        rows[row][column] = entry
        columns.setdefault(column)
    # q_proj says it all unless two modules of a layer end alike.
    short = {column: column.rpartition(".")[2] for column in columns}
    if len(set(short.values())) < len(short):
        short = {column: column for column in columns}
    table = Table(title="trained bits", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for column in columns:
        table.add_column(short[column] or "weight", justify="right", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    for row, cells in rows.items():
        error = max(entry["quantization_error"] for entry in cells.values())
        size = sum(entry["bytes"] for entry in cells.values())
        bits = [_cell(cells[column]) if column in cells else "" for column in columns]
        table.add_row(row, *bits, f"{error:.1%}", f"{size / 1e6:.2f}")
    return table


_EXAMPLES = """examples:
  moq inspect out/model
  moq inspect out/model --json > model.json

A row for each transformer layer, a column for each of its weights with the bits that it was trained
at; the layer's largest quantization error, and its size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `moq inspect`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("directory", help="checkpoint directory that moq export wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs `moq inspect`."""
    description = describe_checkpoint(options.directory)
    if options.json:
        print(json.dumps(description))
        return 0
    console = Console(highlight=False, markup=False, emoji=False)
    model = description["model"]
    console.print(
        f"{description['directory']}: {', '.join(model['architectures'] or ['?'])}, "
        f"{model['dtype']}, moq format {description['format_version']}"
    )
    table = bit_map(description)
    # A terminal wraps a line that is too long; names that are folded letter by letter say nothing.
    unbounded = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(table)
    console.print(
        "error: largest relative quantization error of a layer; 6→8: trained at 6 bits, stored in "
        "8-bit codes; a: asymmetric; g128: one scale per 128 inputs; A8: INT8 activations, static "
        "(A8s), asymmetric (A8a)",
        style="dim",
    )
    other = description["other_tensors"]
    console.print(f"{len(other)} other tensors, {sum(other.values()) / 1e6:.2f} MB")
    total, dense = description["bytes"], description["dense_bytes"]
    console.print(
        f"{total / 1e6:.2f} MB in all, {total / dense:.1%} of {dense / 1e6:.2f} MB unquantized"
        if dense
        else "no tensors"
    )
    if description["mean_bits"] is not None:
        console.print(f"{description['mean_bits']:.2f} bits on average over the trained matrices")
    return 0
