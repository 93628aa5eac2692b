"""`moq verify DIR`: checks every byte of a checkpoint and asks the engine for its logits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from moq import _C
from moq.directory_kind import require_checkpoint
from moq.input_grid import is_static
from moq.layout import DENSE, StoredWeight, quantization_config, stored_weights
from moq.logit_probe import EngineLacksModel, replay_probe
from moq.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    FormatError,
    decode_floats,
    file_sha256,
    list_files,
    read_json,
    read_manifest,
    read_sums,
    tensor_sha256,
)
from moq.progress import track
from moq.staging import recover

# Largest difference between the engine's and PyTorch's FP32 logits, over the largest logit. INT8
# activations turn a difference in the last bit into one of a whole step of their grid.
PROBE_TOLERANCE = 1e-4
PROBE_TOLERANCE_INT8 = 3e-2


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: ``hashes``, ``structure``, ``grid`` or ``probe``.
        passed: False if anything was found; None if the check could not run, as `summary` says.
        summary: what was checked, in one line.
        problems: each names the file and the key, what was expected and what was found.
    """

    name: str
    passed: bool | None
    summary: str
    problems: list[str]


def verify_checkpoint(directory: str | Path, policy: Path | None = None) -> list[Check]:
    """Checks a directory that `moq.export` wrote.

    Args:
        directory: the checkpoint directory.
        policy: a JSON policy, if the engine needs one for this architecture (docs/extend.md).

    Returns:
        One result per check, in order: ``hashes`` (SHA256SUMS against every file), ``structure``
        (headers, index, config and manifest agree), ``grid`` (every code, scale and zero point is a
        point of the trained grid), ``probe`` (the engine's logits against the recorded ones; runs
        only if everything before it passed).
    """
    recover(directory)
    path = Path(directory)
    try:
        require_checkpoint(path)
    except FormatError as error:
        return [Check("hashes", False, "not run", [str(error)])]
    checks = [
        _check("hashes", lambda: _hashes(path)),
        _check("structure", lambda: _structure(path)),
        _check("grid", lambda: _grid(path)),
    ]
    if all(check.passed for check in checks):
        checks.append(_check("probe", lambda: _probe(path, policy)))
    else:
        checks.append(Check("probe", None, "not run: a check before it failed", []))
    return checks


Findings = tuple[bool | None, str, list[str]]


def _check(name: str, run: Callable[[], Findings]) -> Check:
    """Runs one check; an error of the readers is a finding."""
    try:
        passed, summary, problems = run()
    except (FormatError, _C.Error, OSError) as error:
        passed, summary, problems = False, "stopped at the first error", [str(error)]
    except Exception as error:  # whatever a field of another form leads to
        problem = f"{type(error).__name__}: {error}"
        passed, summary, problems = False, "stopped at the first error", [problem]
    return Check(name, passed, summary, problems)


def _hashes(directory: Path) -> Findings:
    sums = read_sums(directory)
    present = list_files(directory)
    problems = [
        f"{directory / name}: listed in SHA256SUMS, missing" for name in sums.keys() - set(present)
    ]
    for name in track(present, "hashing"):
        file = directory / name
        if name not in sums:
            problems.append(f"{file}: not listed in SHA256SUMS")
        elif file.is_symlink() or not file.is_file():
            problems.append(f"{file}: expected a regular file")
        elif (found := file_sha256(file)) != sums[name]:
            problems.append(f"{file}: expected sha256 {sums[name]}, got {found}")
    return not problems, f"{len(sums)} files against SHA256SUMS", sorted(problems)


def _structure(directory: Path) -> Findings:
    manifest = read_manifest(directory)
    config = read_json(directory / CONFIG_NAME)
    weights = stored_weights(manifest, directory)
    checkpoint = _C.Checkpoint(str(directory))
    problems = []
    names = set(checkpoint.names())
    for missing in sorted(manifest["tensors"].keys() - names):
        problems.append(f"{directory}: {missing}: in moq.json, missing from the safetensors files")
    for extra in sorted(names - manifest["tensors"].keys()):
        problems.append(f"{directory}: {extra}: in the safetensors files, missing from moq.json")
    for weight in weights.values():
        for name, (dtype, shape) in weight.tensors().items():
            if name not in checkpoint:
                problems.append(f"{directory}: {name}: expected {dtype} {shape}, missing")
                continue
            info = checkpoint.info(name)
            if (info.dtype, list(info.shape)) != (dtype, shape):
                problems.append(
                    f"{directory}: {name}: expected {dtype} {shape}, got {info.dtype} {info.shape}"
                )
    for name in sorted(names & manifest["tensors"].keys()):
        found = tensor_sha256(checkpoint.read(name))
        expected = manifest["tensors"][name]["sha256"]
        if found != expected:
            problems.append(f"{directory}: {name}: expected sha256 {expected}, got {found}")
    problems += _config_problems(directory, config, manifest, weights)
    return not problems, f"{len(names)} tensors in {len(checkpoint.files())} files", problems


def _config_problems(
    directory: Path,
    config: dict[str, Any],
    manifest: dict[str, Any],
    weights: dict[str, StoredWeight],
) -> list[str]:
    """Config.json's quantization_config must be the one that moq.json's weights give."""
    found = config.get("quantization_config")
    quantized = [weight for weight in weights.values() if weight.format != DENSE]
    if not quantized:
        return (
            []
            if found is None
            else [f"{directory / CONFIG_NAME}: quantization_config: expected none"]
        )
    shared = {name.rpartition(".")[0] for name in manifest["aliases"].values()}
    ignore = found.get("ignore", []) if isinstance(found, dict) else []
    expected = quantization_config(quantized, ignore, shared)
    if found != expected:
        return [
            f"{directory / CONFIG_NAME}: quantization_config: expected what moq.json describes: "
            f"{json.dumps(expected)[:200]}…, got {json.dumps(found)[:200]}…"
        ]
    listed = set(ignore) & {weight.module for weight in quantized}
    return [f"{directory / CONFIG_NAME}: ignore: {name}: is quantized" for name in sorted(listed)]


def _grid(directory: Path) -> Findings:
    manifest = read_manifest(directory)
    checkpoint = _C.Checkpoint(str(directory))
    quantized = [w for w in stored_weights(manifest, directory).values() if w.format != DENSE]
    problems: list[str] = []
    elements = 0
    for weight in track(quantized, "reading codes"):
        problems += [
            f"{directory}: {weight.module}.{problem}" for problem in _off_grid(checkpoint, weight)
        ]
        elements += weight.shape[0] * weight.shape[1]
    return not problems, f"{elements:,} codes of {len(quantized)} weights", problems


def read_codes(
    checkpoint: _C.Checkpoint, weight: StoredWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [out, in], scales [out, groups] and zero points int8 [out, groups] of a weight."""
    name = f"{weight.module}.weight"
    rows, columns = weight.shape
    scales = checkpoint.read(f"{name}_scale")
    zero_points = None if weight.symmetric else checkpoint.read(f"{name}_zero_point")
    if weight.stored_bits is None or f"{name}_packed" not in checkpoint:
        return checkpoint.read(name), scales, zero_points
    codes = _C.unpack_codes(checkpoint.read(f"{name}_packed"), weight.stored_bits, columns)
    if zero_points is not None:
        zero_points = _C.unpack_codes(zero_points.t(), weight.stored_bits, rows).t()
    return codes, scales, zero_points


def _off_grid(checkpoint: _C.Checkpoint, weight: StoredWeight) -> list[str]:
    """What of a weight is not a point of the grid that it was trained on."""
    problems = []
    codes, scales, zero_points = read_codes(checkpoint, weight)
    for what, values in (("weight", codes), ("weight_zero_point", zero_points)):
        if values is not None and values.numel() > 0:
            lowest, highest = int(values.min()), int(values.max())
            if lowest < weight.qmin or highest > weight.qmax:
                problems.append(
                    f"{what}: expected codes of {weight.trained_bits} bits in [{weight.qmin}, "
                    f"{weight.qmax}], got [{lowest}, {highest}]"
                )
    tiny = 2.0**-14 if weight.scale_dtype == "float16" else 2.0**-126
    stored = {"weight_scale": scales}
    if weight.activations is not None and is_static(weight.activations):
        stored["input_scale"] = checkpoint.read(f"{weight.module}.input_scale")
    for what, values in stored.items():
        exact = values.double()
        if not bool((torch.isfinite(exact) & (exact >= tiny)).all()):
            problems.append(f"{what}: expected finite scales >= {tiny:g}, got others")
    if f"{weight.module}.weight_shape" in checkpoint:
        shape = checkpoint.read(f"{weight.module}.weight_shape").tolist()
        if shape != weight.shape:
            problems.append(f"weight_shape: expected {weight.shape}, got {shape}")
    return problems


def _probe(directory: Path, policy: Path | None) -> Findings:
    manifest = read_manifest(directory)
    probe = manifest.get("probe")
    if probe is None:
        return None, f"the checkpoint has none: {manifest.get('no_probe')}", []
    where = f"{directory / MANIFEST_NAME}: probe"
    expected = decode_floats(probe["values"], where)
    try:
        found = replay_probe(directory, probe, policy)
    except EngineLacksModel as lack:
        return None, f"could not run: {lack}", []
    if found.shape != expected.shape:
        problem = f"{where}: expected {list(expected.shape)} values, got {list(found.shape)}"
        return False, "replayed on the engine", [problem]
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    summary = f"{len(probe['input_ids'])} tokens on the engine, largest relative error {error:.1e}"
    int8 = any(weight.activations for weight in stored_weights(manifest, directory).values())
    tolerance = PROBE_TOLERANCE_INT8 if int8 else PROBE_TOLERANCE
    if not error <= tolerance:
        return False, summary, [f"{where}: expected an error <= {tolerance:g}, got {error:g}"]
    return True, summary, []


_EXAMPLES = """examples:
  moq verify out/model
  moq verify out/model --json

The exit status is 1 if a check failed. The logit probe is skipped, and that is said, where the
engine lacks the architecture; --policy tells it how such a model is built."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `moq verify`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("directory", help="checkpoint directory that moq export wrote")
    parser.add_argument("--policy", type=Path, help="JSON policy of an architecture moq lacks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs `moq verify`: 1 if a check failed, 0 otherwise."""
    checks = verify_checkpoint(options.directory, options.policy)
    failed = any(check.passed is False for check in checks)
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}))
        return int(failed)
    console = Console(highlight=False, soft_wrap=True)
    marks = {True: "[green]passed [/]", False: "[red]FAILED [/]", None: "[yellow]skipped[/]"}
    for check in checks:
        console.print(f"{marks[check.passed]}  {check.name:<10} {escape(check.summary)}")
        for problem in check.problems:
            console.print(f"             {escape(problem)}")
    return int(failed)
