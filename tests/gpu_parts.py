"""Runs the parts of tests/gpu.sh: a list of steps each, whose results are appended to one file."""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
BENCHMARKS = ROOT / "tests" / "benchmarks"
LIMIT = 460  # seconds of a part, whose last step then has GRACE to end
GRACE = 20
KERNELS = str(BUILD / "tests" / "cpp" / "moq_kernels_test")
UNSUPPORTED = str(BUILD / "tests" / "cpp" / "moq_unsupported_gpu_test")  # by CUDA 12.8
# A kernel that fails on purpose would be an error that a sanitizer reports.
SANITIZED_TESTS = "-DecodeStepFailureTest.*"
# Of kernels that older GPUs do without, and what they have instead.
OLDER_TESTS = "*LinearCuda*:*LinearTileCuda*:*AttentionCuda*:*SamplingCuda*"
TORCHRUN = ("-P", "-m", "torch.distributed.run", "--nproc-per-node", "gpu")
PROCESSES = min(os.cpu_count() or 1, 12)  # that share the GPU
# Rows of decode, whose peers are compiled for each.
BATCHES = {"gpt2-xl": ("1", "32"), "17b-x12": ("1", "32"), "llama-3.1-8b": ("1",)}
# Under a sanitizer one test in so many runs, and under racecheck, which makes them a hundred times
# slower, a repeated launch is repeated less.
SANITIZED = {"memcheck": 1, "racecheck": 10, "initcheck": 2}


@dataclass(frozen=True)
class Step:
    """A command, and where its results belong."""

    part: str
    name: str
    command: Sequence[str]
    every: int = 0  # of the kernel tests one in so many, in PROCESSES processes; 0: no such tests
    tests: str = "*"  # of which kernel tests, a filter of GoogleTest
    gpus: int = 1  # that it needs

    @property
    def is_test(self) -> bool:
        """Whether it runs tests, and none would be a failure."""
        return self.every > 0 or "pytest" in self.command

    @property
    def key(self) -> str:
        """What --step names it by."""
        return f"{self.part}/{self.name}"


def pytest(*arguments: str, in_parallel: bool = True) -> list[str]:
    """A test run that says what it skipped and why, what took longest and where it stands still."""
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu", "--durations=10"]
    options += ["-o", "faulthandler_timeout=120"]
    command = [sys.executable, "-P", "-m", "pytest", *options]
    if not in_parallel or not importlib.util.find_spec("xdist"):
        return [*command, *arguments]
    # With as many threads each as there are cores, the processes would only wait for each other.
    threads = max((os.cpu_count() or 1) // PROCESSES, 1)
    return ["env", f"OMP_NUM_THREADS={threads}", *command, "-n", str(PROCESSES), *arguments]


def benchmark(script: str, *arguments: str, launcher: Sequence[str] = ()) -> list[str]:
    """A benchmark that prints JSON."""
    path = str(BENCHMARKS / f"{script}.py")
    return [sys.executable, *launcher, path, *arguments, "--json"]


def steps() -> list[Step]:
    """Every step in the order in which they run."""
    found = [
        Step("tests", "kernels", [KERNELS], every=1),
        *(
            Step("tests", f"kernels_{old}", ["env", f"MOQ_GPU_ARCH={old}", KERNELS], 1, OLDER_TESTS)
            for old in (80, 86)
        ),
        *([Step("tests", "unsupported_gpu", [UNSUPPORTED])] if Path(UNSUPPORTED).exists() else []),
        Step("tests", "operators", pytest("tests/ops")),
    ]
    for part, name, folder, of_ranks in (
        ("tests", "training", "tests/training", "tests/training/test_optimizer_sharded.py"),
        ("engine", "engine", "tests/inference", "tests/inference/test_parallel_gpu.py"),
    ):
        found.append(Step(part, name, pytest(folder, f"--ignore={of_ranks}")))
        found.append(Step("ranks", name, pytest(of_ranks, in_parallel=False), gpus=2))
    # The step of all layers in one kernel is the newest GPUs' alone.
    wide = pytest("tests/inference/test_half_precision.py", "-k", "wide and not either_way")
    found.append(Step("tests", "engine_80", ["env", "MOQ_GPU_ARCH=80", *wide]))
    for parallel, modes in (("ddp", ["eager", "compiled"]), ("fsdp", ["eager"])):
        arguments = ["--device", "cuda", "--parallel", parallel, "--modes", *modes]
        command = benchmark("train_step", *arguments, "--roundings", "nearest", launcher=TORCHRUN)
        found.append(Step("ranks", f"train_step_{parallel}", command, gpus=2))
    for tool, every in SANITIZED.items():
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "racecheck":
            sanitizer = ["env", "MOQ_TEST_REPEATS_DIVISOR=60", *sanitizer]
        found.append(Step("sanitizer", tool, [*sanitizer, KERNELS], every, SANITIZED_TESTS))
    for region in ("1", "2", "3", "4a", "4b"):
        found.append(Step("regions", region, benchmark("gpu_regions", "--regions", region)))
    for shape in ("49152x12288", "17024x4256", "4096x14336"):
        found.append(Step("gemm", shape, benchmark("gpu_gemm", "--shapes", shape)))
    for model, batches in BATCHES.items():
        arguments = ["--models", model, "--batch", *batches]
        found.append(Step("decode", model, benchmark("gpu_decode", *arguments)))
    for model in ("bert-base", "bert-large"):
        found.append(Step("encoder", model, benchmark("gpu_encoder", "--models", model)))
    for script in ("fake_quantize", "learned_scales"):
        command = benchmark(script, "--device", "cuda")
        found.append(Step("fake_quantize", script, command))
    for mode in ("eager", "compiled"):
        command = benchmark("train_step", "--device", "cuda", "--modes", mode)
        found.append(Step("train_step", mode, command))
    return found


def commit() -> str:
    """The commit of the build, which names it, or without its word the checkout's."""
    file = BUILD / "commit"
    return file.read_text().strip() if file.exists() else checkout()


def checkout() -> str:
    """The commit of the tests and of the Python sources, which a build is linked to."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() if git.returncode == 0 else "unknown"


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of the results file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def counts(output: str) -> Counter[str]:
    """Numbers of tests that GoogleTest runs or a pytest run report."""
    found: Counter[str] = Counter()
    last_line = output.rstrip().rpartition("\n")[2]
    for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last_line):
        found[what] += int(number)
    for what, number in re.findall(r"\[\s*(PASSED|FAILED|SKIPPED)\s*\] (\d+) test", output):
        found[what.lower()] += int(number)
    return found


def kernel_tests(step: Step) -> list[str]:
    """Names of a step's kernel tests on a GPU, about one in so many: others with each commit."""
    build = commit()

    def is_chosen(name: str, file: str) -> bool:
        if not file.endswith("_cuda_test.cc") and "cuda" not in name.lower():
            return False
        digest = hashlib.sha256(f"{build} {name}".encode()).hexdigest()
        return int(digest, 16) % step.every == 0

    with tempfile.NamedTemporaryFile(suffix=".json") as listed:
        output, tests = f"--gtest_output=json:{listed.name}", f"--gtest_filter={step.tests}"
        arguments = [KERNELS, "--gtest_list_tests", output, tests]
        subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
        suites = json.load(listed)["testsuites"]
    return [
        name
        for suite in suites
        for test in suite["testsuite"]
        if is_chosen(name := f"{suite['name']}.{test['name']}", test["file"])
    ]


def in_shards(step: Step, directory: Path) -> list[str]:
    """A command that runs the kernel tests of a step in several processes at once.

    It shows what failed, what took 20 seconds or longer, and if time is up, which tests were
    running.
    """
    chosen = directory / "tests.txt"
    chosen.write_text("--gtest_filter=" + ":".join(kernel_tests(step)) + "\n")
    command = shlex.join([*step.command, f"--gtest_flagfile={chosen}"])
    shards = range(PROCESSES)
    log = shlex.quote(str(directory / "shard"))
    running = r'/^\[ RUN/ {test = $4} /^\[ +(OK|FAILED|SKIPPED)/ {test = ""} END {print test}'
    # All lines of GoogleTest but of tests that took 20 seconds or longer.
    dull = r"^(Note: .*|\[( RUN|---).*|\[       OK .*\((1?[0-9]{1,4}) ms\))?$"
    say = f"for file in {log}.*; do awk {shlex.quote(running)} $file; done"
    start = [f"GTEST_SHARD_INDEX={i} {command} >{log}.{i} 2>&1 & pids+=($!)" for i in shards]
    wait = 'status=0; for pid in "${pids[@]}"; do wait $pid || status=$?; done'
    script = [
        f"export GTEST_TOTAL_SHARDS={PROCESSES}",
        "trap 'stopped=1; kill $(jobs -p) 2>/dev/null' TERM",
        *start,
        wait,
        f"cat {log}.* | grep -Ev {shlex.quote(dull)}",
        f"[ ! $stopped ] || {say} | sed 's/^./running when stopped: &/'",
        "exit $status",
    ]
    return ["bash", "-c", "\n".join(script)]


def run(step: Step, limit: float, facts: dict[str, str], results: Path) -> bool:
    """Runs one step, shows its output and appends its results; returns whether it succeeded."""
    print(f"== {step.key}", flush=True)
    start = time.monotonic()
    lines: list[str] = []
    missed: dict[str, None] = {}
    logs = tempfile.TemporaryDirectory()
    command = in_shards(step, Path(logs.name)) if step.every else step.command
    # Interrupted, pytest still says what failed.
    stop = signal.SIGINT if "pytest" in command else signal.SIGTERM
    timeout = ["timeout", f"--signal={stop.value}", f"--kill-after={GRACE}", f"{max(limit, 1):.0f}"]
    process = subprocess.Popen(
        [*timeout, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    with logs, results.open("a") as file:
        try:
            for line in process.stdout:
                lines.append(line)
                print(line, end="", flush=True)
                if line.startswith("{") and not step.is_test:
                    row = {"part": step.part, "step": step.name} | json.loads(line) | facts
                    file.write(json.dumps(row) + "\n")
                    if not row.get("met", True):
                        missed[f"{row['case']}: {'; '.join(row['targets'])}"] = None
            status = process.wait()
        except BaseException:  # KeyboardInterrupt too: the GPU is left free
            process.send_signal(stop)
            print(process.stdout.read(), end="", flush=True)
            process.wait()
            raise
        found = counts("".join(lines))
        outcome = {0: "done", 124: f"out of time after {limit:.0f} s"}
        if status == 0 and step.is_test and not found["passed"]:
            status, outcome = 1, {1: "failed: no test ran"}
        summary = {
            "part": step.part,
            "step": step.name,
            "status": outcome.get(status, f"failed with exit status {status}"),
            "seconds": round(time.monotonic() - start, 1),
            **found,
            **({"missed": list(missed)} if missed else {}),
            **facts,
        }
        file.write(json.dumps(summary) + "\n")
    for target in missed:
        print(f"-- {target}")
    print(f"-- {step.key}: {summary['status']}, {summary['seconds']} s", flush=True)
    return status == 0


def main() -> int:
    """Runs what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = steps()
    parts = list(dict.fromkeys(step.part for step in every))
    parser.add_argument("--part", choices=parts, help="one part; default: all")
    parser.add_argument("--step", help="one step, as --list names it")
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    parser.add_argument("--results", type=Path, default=BUILD / "results.jsonl")
    parser.add_argument("--list", action="store_true", help="print the steps' names and stop")
    args = parser.parse_args()
    chosen = [
        s for s in every if args.part in (None, s.part) and args.step in (None, s.key, s.name)
    ]
    if not chosen:
        of_part = f" of part {args.part}" if args.part else ""
        parser.error(f"no step{of_part} is named {args.step!r}: --list names them")
    if args.list:
        print("\n".join(step.key for step in chosen))
        return 0
    if not any((BUILD / "python" / "moq").glob("_C*.so")):
        sys.exit(f"there is no build in {BUILD.relative_to(ROOT)}: tests/gpu.sh --build")
    sys.path.insert(0, str(BENCHMARKS))
    import gpu
    import torch

    gpu.require()
    os.environ["MOQ_COMMIT"] = commit()
    facts = gpu.facts() | {"commit": commit(), "checkout": checkout()}
    unchanged = ("commit", "checkout", "machine")
    has_no_name = any(re.search("-dirty$|^unknown$", facts[key]) for key in unchanged)
    done = {
        (line["part"], line["step"])
        for line in read_results(args.results)
        if line.get("status") == "done"
        and not has_no_name
        and all(line.get(key) == facts[key] for key in unchanged)
    }
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed, ends = [], {}
    for step in chosen:
        if (step.part, step.name) in done and not args.again:
            print(f"== {step.key}: done before, see {args.results}")
            continue
        if step.gpus > torch.cuda.device_count():
            print(f"== {step.key}: left out, it needs {step.gpus} GPUs")
            continue
        end = ends.setdefault(step.part, time.monotonic() + LIMIT)
        if not run(step, end - time.monotonic(), facts, args.results):
            failed.append(step.key)
    print("all done" if not failed else f"not done: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
