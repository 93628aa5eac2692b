"""What a directory is: a run, a checkpoint, or neither, with a word on what to do about it."""

from __future__ import annotations

from pathlib import Path

from moq.manifest import MANIFEST_NAME, SUMS_NAME, FormatError

RUN_NAME = "run.json"
MASTERS_NAME = "masters.safetensors"


def require_run(path: Path) -> None:
    """Refuses what is no run with a word on what it is.

    Raises:
        FormatError: always, unless run.json is there.
    """
    if (path / RUN_NAME).is_file():
        return
    if (path / MANIFEST_NAME).is_file():
        found = "a checkpoint, which has no record of its training: name the run that it is from"
    else:
        found = _nature(path, RUN_NAME)
    raise FormatError(
        f"{path}: must be a run, the directory that optimizer.save(DIR) wrote, got {found}"
    )


def require_checkpoint(path: Path) -> None:
    """Refuses what is no checkpoint with a word on what it is.

    Raises:
        FormatError: always, unless moq.json or SHA256SUMS is there: of one alone a check of its own
            says what is missing.
    """
    if any((path / name).is_file() for name in (MANIFEST_NAME, SUMS_NAME)):
        return
    if (path / RUN_NAME).is_file():
        found = _a_run(path)
    else:
        found = _nature(path, MANIFEST_NAME)
    raise FormatError(
        f"{path}: must be a checkpoint, the directory that optimizer.export(DIR) or moq export "
        f"wrote, got {found}"
    )


def refuse_run(path: Path) -> None:
    """Refuses a run where a model is served: its weights were not exported.

    Raises:
        FormatError: for a directory that holds a run and no checkpoint.
    """
    is_run = all((path / name).is_file() for name in (RUN_NAME, MASTERS_NAME))
    if is_run and not (path / MANIFEST_NAME).is_file():
        raise FormatError(
            f"{path}: must be a checkpoint or a Hugging Face directory, got {_a_run(path)}"
        )


def _a_run(path: Path) -> str:
    return f"a run: moq export {path} -o DIR makes a checkpoint of it"


def _nature(path: Path, missing: str) -> str:
    if path.is_dir():
        return f"a directory without {missing}"
    return "a file" if path.exists() else "nothing there"
