"""Kills exports, in a process of its own: it forks, and fork and threads do not go together.

    python staging_worker.py DIRECTORY

Prints one JSON object.
"""

import itertools
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

from exported import Spec, quantize_modules  # noqa: E402

from moq import _C  # noqa: E402
from moq.export import export_checkpoint  # noqa: E402
from moq.manifest import file_sha256, list_files, read_sums  # noqa: E402
from moq.staging import recover  # noqa: E402


def export(directory: Path, seed: int) -> None:
    """Exports one of several checkpoints that differ in every weight."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    export_checkpoint(directory, model, quantize_modules(model, {"0": Spec(), "1": Spec()}))


def complete_content(directory: Path) -> str:
    """Hash of SHA256SUMS if every file is there and true; otherwise what is wrong."""
    recover(directory)
    sums = read_sums(directory)
    if sorted(sums) != list_files(directory):
        return f"files {list_files(directory)} for {sorted(sums)}"
    for name, expected in sums.items():
        if file_sha256(directory / name) != expected:
            return f"{name} is broken"
    return file_sha256(directory / "SHA256SUMS")


def announce(module: object, name: str) -> None:
    """Lets the audit hook see a function that Python does not audit, before and after."""
    function = getattr(module, name)

    def announced(*arguments):
        sys.audit(f"moq.{name}.begin")
        result = function(*arguments)
        sys.audit(f"moq.{name}.end")
        return result

    setattr(module, name, announced)


def in_child(action) -> int:
    """Runs the action in a forked child; its signal if it was killed, 0 if it ended."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def export_and_die(directory: Path, seed: int, last_call: int) -> None:
    """Exports; the process kills itself when it makes its last_call-th call to the file system."""
    calls = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal calls
        if event.startswith("moq.") or str(directory.parent) in "\n".join(map(str, arguments)):
            calls += 1
            if calls == last_call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    export(directory, seed)


def kill(directory: Path) -> dict:
    """Kills replacements at every call to the file system, and after staggered times."""
    contents = []
    for seed in (0, 1):
        export(directory, seed)
        contents.append(complete_content(directory))
    outcomes = {"old": 0, "new": 0}
    broken = []

    def judge(moment: str) -> None:
        content = complete_content(directory)
        if content in contents:
            outcomes[("old", "new")[contents.index(content)]] += 1
        else:
            broken.append(f"{moment}: {content}")
        if content != contents[0]:
            in_child(partial(export, directory, 0))

    in_child(partial(export, directory, 0))
    for call in itertools.count(1):
        if in_child(partial(export_and_die, directory, 1, call)) != signal.SIGKILL:
            judge("the end")  # it makes fewer calls
            break
        judge(f"call {call}")
    for milliseconds in range(0, 48, 4):
        process = os.fork()
        if process == 0:
            export(directory, 1)
            os._exit(0)
        time.sleep(milliseconds / 1000)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        judge(f"{milliseconds} ms")
    in_child(partial(export, directory, 0))
    return {
        "outcomes": outcomes,
        "broken": broken,
        "left": sorted(os.listdir(directory.parent)),
    }


def concurrent(directory: Path) -> dict:
    """Several processes replace one directory again and again."""
    contents = []
    for seed in range(3):
        export(directory, seed)
        contents.append(complete_content(directory))
    processes = []
    for seed in range(3):
        process = os.fork()
        if process == 0:
            for _ in range(3):
                export(directory, seed)
            os._exit(0)
        processes.append(process)
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    return {
        "statuses": statuses,
        "content_is_one_of_them": complete_content(directory) in contents,
        "left": sorted(os.listdir(directory.parent)),
    }


def main(directory: Path) -> None:
    announce(_C, "write_safetensors")
    announce(_C, "exchange_paths")
    announce(os, "fsync")
    announce(os, "close")
    outcome = {
        "exchange": kill(directory / "exchange" / "out"),
        "concurrent exchange": concurrent(directory / "concurrent" / "out"),
    }
    _C.exchange_paths = lambda first, second: False
    outcome["concurrent no-exchange"] = concurrent(directory / "concurrent-no" / "out")
    outcome["no-exchange"] = kill(directory / "no-exchange" / "out")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
