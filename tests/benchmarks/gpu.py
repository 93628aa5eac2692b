"""What the GPU benchmarks share: where they ran, cold weights, graphs and their medians.

Every figure is device time of a captured CUDA graph unless its script says otherwise. Weights
rotate through more than sixteen times the L2 cache, so that each is read from memory as in a model
that does not fit there, and graphs of one kernel's calls last a millisecond at least. Competitors
take turns, and the median of the turns counts.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from report import Target, machine
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
READ_BYTES = 4 << 30
# That a graph of calls takes at least: as many as a step of a model, so that the microseconds in
# which a graph starts do not count as some few calls' own.
GRAPH_SECONDS = 1e-3
STARTED = time.monotonic()
Call = Callable[[int], object]


def arguments(parser: argparse.ArgumentParser, turns: int = 21) -> None:
    """Options of every GPU benchmark."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--turns", type=int, default=turns, help=f"timings, their median counts ({turns})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def require() -> None:
    """Ends the program, with the remedy, where nothing can be measured."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: run this on a machine with a GPU (tests/gpu.sh)")
    import moq

    if moq._C.build_info()["cuda_architectures"] is None:
        sys.exit("moq was built without CUDA: build it with MOQ_CUDA=on (tests/gpu.sh --build)")


def progress(text: str) -> None:
    """Says on standard error what is done, and when: some of these scripts take minutes."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", file=sys.stderr, flush=True)


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"no {distribution}"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip().partition("\n")[0]


def facts() -> dict[str, str]:
    """Machine, versions and date: what a row must be read with."""
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = os.environ.get("MOQ_COMMIT") or _output("git", "describe", "--always", "--dirty")
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    versions += [_version("triton"), _version("transformers"), f"moq {commit or 'unknown'}"]
    return {
        "machine": f"{properties.name}, driver {driver or 'unknown'}",
        "versions": ", ".join(versions),
        "date": date.today().isoformat(),
    }


def targets(*wanted: Target) -> Sequence[Target]:
    """Those of an H200, for which they were set; none elsewhere."""
    return wanted if "H200" in torch.cuda.get_device_name() else ()


def facts_on(device: str) -> dict[str, str]:
    """The same of "cuda", or of this machine's processor, as many threads as torch uses."""
    if device == "cuda":
        return facts()
    return {
        "machine": f"{machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}",
        "date": date.today().isoformat(),
    }


def copies_of(num_bytes: int) -> int:
    """Copies of a weight that together exceed sixteen times the L2 cache.

    Lines that may be evicted first make room for others like them, so that older ones stay, up to
    the cache's size: of four times the cache, a quarter might still be there at the next turn.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(math.ceil(16 * cache / num_bytes) + 1, 2)


def capture(call: Call, times: int) -> torch.cuda.CUDAGraph:
    """One graph of call(0), call(1), … so many times, each having run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(times):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(times):
            call(i)
    return graph


class Uncaptured:
    """The same calls one by one, for a competitor that waits for the device and fits no graph."""

    def __init__(self, call: Call, times: int) -> None:
        """Calls once to warm up."""
        self.call, self.times = call, times
        self.replay()

    def replay(self) -> None:
        """Makes the calls."""
        for i in range(self.times):
            self.call(i)


Replayed = torch.cuda.CUDAGraph | Uncaptured


def replay_seconds(graph: Replayed, times: int = 1) -> float:
    """Device seconds of one replay, the mean of so many in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(400_000)  # the device waits while the host queues what is timed
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def median_of_turns(graphs: Mapping[str, Replayed], turns: int) -> dict[str, float]:
    """Median seconds of each graph; in every turn each is replayed once, the first uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(turns + 2):
        for name, graph in graphs.items():
            elapsed = replay_seconds(graph)
            if turn > 1:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def median_of_calls(
    calls: dict[str, Call], copies: int, turns: int, uncaptured: Sequence[str] = ()
) -> dict[str, float]:
    """Median seconds of one call of each competitor, inside a graph that GRAPH_SECONDS describes.

    The calls rotate through the copies. Uncaptured competitors make one call for each.
    """
    graphs: dict[str, Replayed] = {}
    times = dict.fromkeys(calls, copies)
    for name, call in calls.items():
        if name in uncaptured:
            graphs[name] = Uncaptured(call, copies)
            continue
        once = capture(call, copies)
        seconds = min(replay_seconds(once) for _ in range(3))
        times[name] *= math.ceil(GRAPH_SECONDS / seconds)
        graphs[name] = capture(partial(_rotating, call, copies), times[name])
    medians = median_of_turns(graphs, turns)
    return {name: medians[name] / times[name] for name in calls}


def _rotating(call: Call, copies: int, i: int) -> object:
    return call(i % copies)


def read_bandwidth(turns: int = 9) -> float:
    """Bytes a second that reading takes place at: the better of plain loads and bulk copies."""
    buffer = torch.zeros(READ_BYTES, dtype=torch.uint8, device="cuda")
    rates = [
        statistics.median(
            torch.ops.moq.read_bandwidth(buffer, prefetch=prefetch) for _ in range(turns)
        )
        for prefetch in (False, True)
    ]
    return max(rates)


def readings(num_bytes: int) -> dict[str, Call]:
    """Two ways to read so many bytes, of as many copies as copies_of makes, and do nothing else."""
    size = -(-num_bytes // 16) * 16
    buffers = torch.zeros(copies_of(num_bytes), size, dtype=torch.uint8, device="cuda")
    found = torch.zeros(1, dtype=torch.int64, device="cuda")

    def read(i: int, *, prefetch: bool) -> None:
        torch.ops.moq.read_once(buffers[i], found, prefetch=prefetch)

    return {"loads": partial(read, prefetch=False), "copies": partial(read, prefetch=True)}


def random_weight(n: int, k: int, seed: int) -> Tensor:
    """A float16 weight [n, k] of the size that trained ones have."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (0.02 * torch.randn(n, k, device="cuda", generator=generator)).half()


def pack(weight: Tensor, format: str) -> Tensor:
    """A float16 weight as moq packs it: "float16", or "int8" with a scale per row."""
    if format == "float16":
        return torch.ops.moq.pack_linear(weight, format=format)
    codes, scales, _ = torch.ops.moq.quantize(weight.float(), 8)
    return torch.ops.moq.pack_linear(codes, scales)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    difference = (actual.float() - expected.float()).abs().max()
    return (difference / expected.float().abs().max()).item()


def chosen(names: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The wanted names in their order, or all."""
    return [name for name in names if not wanted or name in wanted]
