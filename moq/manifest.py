"""moq.json and SHA256SUMS: what a checkpoint says about itself. docs/FORMAT.md has every field."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moq.staging import files_below

FORMAT_VERSION = 1
MANIFEST_NAME = "moq.json"
SUMS_NAME = "SHA256SUMS"
CONFIG_NAME = "config.json"

_SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\0]+)")


class FormatError(ValueError):
    """A file of a checkpoint that does not hold what the format says."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes strict JSON; a NaN or an infinity in it is an error."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads one strict JSON object.

    Raises:
        FormatError: naming the file, if it is missing, not UTF-8, repeats a key, holds NaN, or is
            not an object.
    """
    if not path.is_file():
        raise FormatError(
            f"{path}: must exist, and is missing: name a directory that moq wrote "
            "(optimizer.export writes checkpoints, optimizer.save runs)"
        )

    def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(members)
        if len(value) != len(members):
            raise ValueError("a key is repeated")
        return value

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse
        )
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected a JSON object, got {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads moq.json of a format version that this release knows.

    Raises:
        FormatError: naming the file, what was expected and what was found.
    """
    path = directory / MANIFEST_NAME
    manifest = read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}: read it with the "
            "release of moq that wrote it, or a newer one"
        )
    for key in ("weights", "tensors", "aliases", "written_by"):
        if not isinstance(manifest.get(key), dict):
            raise FormatError(f"{path}: {key} must be an object, got {manifest.get(key)!r}")
    return manifest


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as a file holds them: contiguous, little-endian."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path) -> list[str]:
    """Relative path of every file of a checkpoint but SHA256SUMS, sorted."""
    return [name for name in files_below(directory) if name != SUMS_NAME]


def write_sums(directory: Path, names: Iterable[str]) -> None:
    """Writes SHA256SUMS over `names`, in the form that ``sha256sum --check`` reads."""
    lines = [f"{file_sha256(directory / name)}  {name}\n" for name in sorted(names)]
    (directory / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def read_sums(directory: Path) -> dict[str, str]:
    """Reads SHA256SUMS: relative path of a file -> SHA-256.

    Raises:
        FormatError: naming the line, if one cannot be parsed, leads out of the directory or names a
            file twice.
    """
    path = directory / SUMS_NAME
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: expected one line a file, got {error}") from error
    if not text.endswith("\n"):
        raise FormatError(f"{path}: expected a line break at the end")
    sums: dict[str, str] = {}
    # str.splitlines would also split at other characters, and miss a line break that became one.
    for number, line in enumerate(text[:-1].split("\n"), start=1):
        match = _SUMS_LINE.fullmatch(line)
        if match is None or not {"", ".", ".."}.isdisjoint(match[2].split("/")):
            raise FormatError(f"{path}: line {number}: expected 'sha256  name', got {line!r}")
        if match[2] in sums:
            raise FormatError(f"{path}: line {number}: expected {match[2]} once, got it again")
        sums[match[2]] = match[1]
    return sums


def encode_floats(values: torch.Tensor) -> dict[str, Any]:
    """A float32 tensor as JSON: its shape, and its little-endian bytes in base64."""
    values = values.detach().cpu().to(torch.float32).contiguous()
    return {
        "shape": list(values.shape),
        "float32": base64.b64encode(values.numpy().tobytes()).decode("ascii"),
    }


def decode_floats(encoded: object, where: str) -> torch.Tensor:
    """The inverse of `encode_floats`.

    Raises:
        FormatError: naming `where`, if the value has another form.
    """
    if not isinstance(encoded, dict) or set(encoded) != {"shape", "float32"}:
        raise FormatError(f"{where}: expected shape and float32, got {type(encoded).__name__}")
    shape = encoded["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise FormatError(f"{where}: expected a shape, got {shape!r}")
    try:
        raw = base64.b64decode(encoded["float32"], validate=True)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: expected base64, got {error}") from error
    if len(raw) != 4 * math.prod(shape):
        raise FormatError(f"{where}: expected {4 * math.prod(shape)} bytes, got {len(raw)}")
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
