"""A directory is replaced as a whole, whoever is killed and whoever else is writing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moq import _C, staging
from moq.staging import files_below, recover, replaced_directory

WORKER = Path(__file__).with_name("staging_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(memory_path) -> dict:
    """What the worker reports: one process for all tests, because its imports take seconds."""
    result = subprocess.run(
        [sys.executable, str(WORKER), str(memory_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def write(directory: Path, text: str) -> None:
    with replaced_directory(directory, files_below) as staged:
        (staged / "file").write_text(text)


def without_exchange(monkeypatch) -> None:
    monkeypatch.setattr(_C, "exchange_paths", lambda first, second: False)


@pytest.mark.parametrize("mode", ["exchange", "no-exchange"])
def test_a_killed_export_leaves_the_complete_old_or_new_directory(outcomes, mode):
    outcome = outcomes[mode]
    assert outcome["broken"] == []
    assert sum(outcome["outcomes"].values()) >= 50
    assert outcome["outcomes"]["old"] > 0
    assert outcome["outcomes"]["new"] > 0
    assert outcome["left"] == ["out"]


@pytest.mark.parametrize("mode", ["exchange", "no-exchange"])
def test_concurrent_exports_to_one_place_do_not_mix(outcomes, mode):
    outcome = outcomes[f"concurrent {mode}"]
    assert outcome["statuses"] == [0, 0, 0]
    assert outcome["content_is_one_of_them"]
    assert outcome["left"] == ["out"]


def test_a_directory_is_created_with_its_parents(tmp_path):
    write(tmp_path / "a" / "b", "1")
    assert (tmp_path / "a" / "b" / "file").read_text() == "1"
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_and_nothing_is_left(tmp_path, monkeypatch, exchange):
    if not exchange:
        without_exchange(monkeypatch)
    write(tmp_path / "out", "1")
    write(tmp_path / "out", "2")
    assert (tmp_path / "out" / "file").read_text() == "2"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_keeps_the_old_content(tmp_path):
    write(tmp_path / "out", "1")
    with pytest.raises(KeyError), replaced_directory(tmp_path / "out", files_below) as staged:
        (staged / "file").write_text("2")
        raise KeyError
    assert (tmp_path / "out" / "file").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "meanwhile"])
def test_a_file_of_somebody_else_is_not_deleted(tmp_path, late):
    write(tmp_path / "out", "1")
    own = files_below(tmp_path / "out")
    foreign = tmp_path / "out" / "checkpoint-500" / "optimizer.pt"
    if not late:
        foreign.parent.mkdir()
        foreign.touch()
    with (
        pytest.raises(ValueError, match=r"got checkpoint-500/optimizer\.pt in it: move it away"),
        replaced_directory(tmp_path / "out", lambda target: own) as staged,
    ):
        (staged / "file").write_text("2")
        assert late
        foreign.parent.mkdir()
        foreign.touch()
    assert foreign.exists()
    assert (tmp_path / "out" / "file").read_text() == "1"
    kept = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert [(path / "file").read_text() for path in kept] == (["2"] if late else [])


def test_a_file_in_the_place_of_a_directory_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="expected a directory, got a file"):
        write(tmp_path / "out", "1")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    write(tmp_path / "out", "1")
    (tmp_path / ".out.new-abc").mkdir()
    (tmp_path / ".out.new-abc" / "file").write_text("half")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".other.new-abc").mkdir()
    write(tmp_path / "out", "2")
    assert sorted(os.listdir(tmp_path)) == [".other.new-abc", "out"]


def test_a_replacement_that_died_between_its_renames_is_undone_when_opened(tmp_path):
    write(tmp_path / "out", "1")
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_recovery_changes_nothing_else(tmp_path):
    recover(tmp_path / "none")
    assert os.listdir(tmp_path) == []
    write(tmp_path / "out", "1")
    (tmp_path / ".out.old").mkdir()
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "1"


def test_a_link_keeps_leading_to_the_directory(tmp_path):
    write(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "2"


def test_the_root_is_refused():
    with (
        pytest.raises(ValueError, match="a directory of its own"),
        replaced_directory("/", files_below),
    ):
        pass


def test_every_file_and_directory_is_flushed_before_the_swap(tmp_path, monkeypatch):
    events = []
    flush, swap = os.fsync, staging._swap
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(_path(fd)), flush(fd)))
    monkeypatch.setattr(staging, "_swap", lambda a, b: (events.append("swap"), swap(a, b)))
    with replaced_directory(tmp_path / "out", files_below) as staged:
        (staged / "a").write_text("a")
        (staged / "b").write_text("b")
    before = events[: events.index("swap")]
    assert sorted(before) == sorted([str(staged / "a"), str(staged / "b"), str(staged)])
    assert events[-1] == str(tmp_path)


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
