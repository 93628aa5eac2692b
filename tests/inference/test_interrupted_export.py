"""A directory whose replacement was killed halfway, where the file system has no exchange."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import one_thread_environment, run_ranks

from moq.inference import Engine

# Replaces a directory, and is killed between the two renames.
_KILLED = """
import os, signal, sys
from moq import _C
from moq.staging import files_below, replaced_directory
_C.exchange_paths = lambda first, second: False
rename = os.rename
def rename_and_die(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
with replaced_directory(sys.argv[1], files_below) as staged:
    (staged / "config.json").write_text("{}")
    os.rename = rename_and_die
"""


@pytest.fixture
def interrupted(tmp_path, model_directory) -> Path:
    """The name of a model whose replacement was killed."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory("llama"), directory)
    command = [sys.executable, "-c", _KILLED, directory]
    assert subprocess.run(command, env=one_thread_environment()).returncode == -signal.SIGKILL
    assert not directory.exists()
    return directory


def test_the_old_model_is_served(interrupted, model_directory):
    row = [[2, 3, 4]]
    expected = Engine.from_pretrained(model_directory("llama")).forward(row)
    assert torch.equal(Engine.from_pretrained(interrupted).forward(row)[0], expected[0])


def test_ranks_that_come_at_the_same_time_all_find_it(interrupted):
    open_it = "import sys; from moq.inference import Engine; Engine.from_pretrained(sys.argv[1])"
    run_ranks(2, ["-c", open_it, interrupted])
