"""Speed of one multi-tensor fake-quantize over all linear weights of a model.

The training step reads the masters and writes the simulated weights once, so what it can at best
cost is a copy of as many bytes: one copy between two large buffers in the same run. Peers:

  copy      the copy bandwidth, on a GPU the better of this and torch._foreach_copy_ of the same
            tensors, which stands beside it
  torch     torch.fake_quantize_per_channel_affine, with the scales' absmax, weight by weight
  compiled  the same arithmetic under torch.compile, weight by weight (GPU)

"BF16" reads float32 masters and writes bfloat16 weights; "FP32" and "BF16 masters" have one dtype.
Values are drawn at random; what counts is the shapes. Competitors take turns. On a CPU the best
turn of each counts, because other processes disturb the rest; the medians stand beside it, and that
of the turns' ratios, because a shared memory has more bandwidth at some times than at others; so
does what the arithmetic alone would allow, the rate for weights that stay in the caches of a core,
times the threads. On a GPU it is the median of CUDA graphs (torch's operator excepted, which waits
for the device) whose calls rotate through copies of the weights that exceed sixteen times the L2
cache.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import gpu
import torch
from report import Row, print_rows

import moq  # noqa: F401  (registers the operators)

# Output and input features of the linear layers, and how often they occur.
MODELS = {
    "MiniLM-L6": {(384, 384): 24, (1536, 384): 6, (384, 1536): 6},
    "SmolLM2-135M": {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30},
    "BERT-base": {(768, 768): 48, (3072, 768): 12, (768, 3072): 12},
    "decoder-1.3B": {(2048, 2048): 96, (8192, 2048): 24, (2048, 8192): 24},
}
DEFAULT_MODELS = {
    "cpu": ["MiniLM-L6", "SmolLM2-135M", "BERT-base"],
    "cuda": ["BERT-base", "decoder-1.3B"],
}
DTYPES = {  # of the masters and of the simulated weights
    "FP32": (torch.float32, torch.float32),
    "BF16": (torch.float32, torch.bfloat16),
    "BF16 masters": (torch.bfloat16, torch.bfloat16),
}
CASES = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "nearest, Conv1D storage": {"transposed": True},
    "nearest, asymmetric": {"quant_mode": "asymmetric"},
    "nearest, per group of 64": {"granularity": "per_group", "group_size": 64},
    "nearest, per tensor": {"granularity": "per_tensor"},
}
MAIN_CASES = ("nearest", "stochastic")  # those of every dtype; the others in FP32
UNCAPTURED = ("torch",)  # its operator looks at the zero points on the host
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
CACHED = {(128, 768): 1}  # with its result, less than a core's second-level cache
CACHED_REPEATS = 20  # in one call, together less than what is stored past the caches
PAUSE = 0.02  # seconds: torch's threads spin for some milliseconds after their work, on cores that
# the next competitor could use

Tensors = list[torch.Tensor]
Layers = dict[tuple[int, int], int]
Call = Callable[[int], object]
Times = dict[str, list[float]]


class Weights:
    """A model's masters and the tensors that simulated weights are written to, some copies of them.

    Args:
        layers: shapes and how often they occur.
        dtypes: one of DTYPES.
        device: "cpu" or "cuda".
        repeats: how often one call of moq's kernel goes through all of them.
    """

    def __init__(self, layers: Layers, dtypes: str, device: str, repeats: int = 1) -> None:
        """Draws the values."""
        source, target = DTYPES[dtypes]
        shapes = [shape for shape, count in layers.items() for _ in range(count)]
        numel = sum(rows * columns for rows, columns in shapes)
        self.num_bytes = numel * (source.itemsize + target.itemsize)
        # A call that itself moves sixteen times the cache leaves nothing of it to the next.
        self.copies = max(gpu.copies_of(self.num_bytes) - 1, 1) if device == "cuda" else 1
        self.out_dtype = target
        generator = torch.Generator(device).manual_seed(0)
        self.masters: list[Tensors] = [
            [
                (0.02 * torch.randn(*shape, device=device, generator=generator)).to(source)
                for shape in shapes
            ]
            for _ in range(self.copies)
        ]
        self.device = device
        self.repeats = repeats

    def outputs(self) -> list[Tensors]:
        """Where to write."""
        return [[torch.empty_like(w, dtype=self.out_dtype) for w in ws] for ws in self.masters]

    def moq(self, arguments: dict[str, object]) -> Call:
        """One call of moq's kernel; Conv1D storage is that of the transposed weights."""
        stored = self.masters
        if "transposed" in arguments:
            stored = [[weight.t().contiguous() for weight in weights] for weights in stored]
        out = [[torch.empty_like(w, dtype=self.out_dtype) for w in ws] for ws in stored]
        stored, out = ([self.repeats * tensors for tensors in ts] for ts in (stored, out))
        num_bits = torch.full((len(stored[0]),), 8, dtype=torch.int32, device=self.device)
        step = torch.ones(1, dtype=torch.int64, device=self.device)
        arguments = arguments | {"step": step, "scale_dtype": self.out_dtype}
        op = torch.ops.moq.foreach_fake_quantize
        return lambda i: op(stored[i], num_bits, **arguments, out=out[i])

    def copy(self) -> Call:
        """The same tensors copied."""
        out = self.outputs()
        return lambda i: torch._foreach_copy_(out[i], self.masters[i])

    def torch(self) -> Call:
        """The same simulated weights from torch's own operator."""
        return lambda i: [_per_channel_affine(weight) for weight in self.masters[i]]

    def compiled(self) -> Call:
        """The same arithmetic from inductor, one kernel for each shape."""
        out = self.outputs()
        torch._dynamo.reset()  # shapes and dtypes count against one limit
        call = torch.compile(_fake_quantize, dynamic=False)
        return lambda i: [call(w, o) for w, o in zip(self.masters[i], out[i], strict=True)]


def _per_channel_affine(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1) / 127
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -127, 127)


def _fake_quantize(weight: torch.Tensor, out: torch.Tensor) -> None:
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    out.copy_((weight / scale).round().clamp(-127, 127) * scale)


def seconds_of(
    calls: dict[str, Call], copies: int, turns: int, device: str, pause: float = PAUSE
) -> Times:
    """Seconds of calls of each competitor; every turn calls each once, the first uncounted."""
    if device == "cuda":
        medians = gpu.median_of_calls(calls, copies, turns, UNCAPTURED)
        return {name: [seconds] for name, seconds in medians.items()}
    times: Times = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            time.sleep(pause)
            start = time.perf_counter()
            call(0)
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return times


def arithmetic_rate(dtypes: str, arguments: dict[str, object], turns: int) -> float:
    """Bytes a second of one thread whose weights stay in its core's caches."""
    weights = Weights(CACHED, dtypes, "cpu", CACHED_REPEATS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = seconds_of({"moq": weights.moq(arguments)}, 1, 10 * turns, "cpu", pause=0.0)["moq"]
    torch.set_num_threads(threads)
    return CACHED_REPEATS * weights.num_bytes / min(times)


def launches(call: Call) -> int:
    """Kernels of one call on the GPU."""
    call(0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call(0)
        torch.cuda.synchronize()
    kinds = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in kinds)


def measure(model: str, turns: int, device: str) -> tuple[list[Row], list[Row]]:
    """Rows against the copy bandwidth and rows against the other peers."""
    against_copy, against_others = [], []
    large = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(large)
    for dtypes in DTYPES:
        weights = Weights(MODELS[model], dtypes, device)
        for case, arguments in CASES.items():
            if case not in MAIN_CASES and dtypes != "FP32":
                continue
            calls = {
                "moq": weights.moq(arguments),
                "copy": lambda i: target.copy_(large),
                "foreach": weights.copy(),
            }
            seconds = seconds_of(calls, weights.copies, turns, device)
            gigabytes = dict.fromkeys(calls, weights.num_bytes / 1e9)
            gigabytes["copy"] = 2 * COPY_BYTES[device] / 1e9
            best = {name: gigabytes[name] / min(seconds[name]) for name in calls}
            note = f"({1e3 * min(seconds['moq']):.3f} ms; foreach_copy {best['foreach']:.0f} GB/s"
            copied = best["copy"]
            if device == "cuda":
                note += f"; launches: {launches(calls['moq'])}"
                copied = max(copied, best["foreach"])
            else:
                medians = {n: gigabytes[n] / statistics.median(seconds[n]) for n in calls}
                note += f"; medians {medians['moq']:.0f} and {medians['copy']:.0f} GB/s"
                pairs = zip(seconds["moq"], seconds["copy"], strict=True)
                scale = gigabytes["moq"] / gigabytes["copy"]
                turn = statistics.median(scale * copy / own for own, copy in pairs)
                note += f", {turn:.2f}x in the median turn"
                alone = torch.get_num_threads() * arithmetic_rate(dtypes, arguments, turns)
                note += f"; arithmetic alone {alone / 1e9:.0f} GB/s"
            row = Row(f"{model} {dtypes} {case}", best["moq"], copied, "GB/s", f"{note})")
            against_copy.append(row)
            del calls
        peers: dict[str, Call] = {}
        if dtypes == "FP32":  # torch's has no other
            peers["torch"] = weights.torch()
        if device == "cuda":
            peers["compiled"] = weights.compiled()
        calls = {"moq": weights.moq({})} | peers
        seconds = seconds_of(calls, weights.copies, turns, device) if peers else {}
        for peer in peers:
            times = (1e3 * min(seconds["moq"]), 1e3 * min(seconds[peer]))
            against_others.append(Row(f"{model} {dtypes} nearest, {peer}", *times, "ms"))
        del weights, calls, peers
        if device == "cuda":
            torch.cuda.empty_cache()
        gpu.progress(f"{model} {dtypes}")
    return against_copy, against_others


Measure = Callable[[str, int, str], tuple[list[Row], list[Row]]]


def main(description: str | None, measure: Measure, what: str) -> int:
    """Measures models and prints both tables: `what` against a copy and against torch."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (CPU)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    gpu.arguments(parser)
    options = parser.parse_args()
    if options.device == "cuda":
        gpu.require()
    else:
        torch.set_num_threads(options.threads)
    facts = gpu.facts_on(options.device)
    tables: tuple[list[Row], list[Row]] = ([], [])
    for model in options.models or DEFAULT_MODELS[options.device]:
        for table, rows in zip(tables, measure(model, options.turns, options.device), strict=True):
            table.extend(rows)
    for table, peer in zip(tables, ("copy", "torch"), strict=True):
        if table:
            title = "the copy bandwidth" if peer == "copy" else peer
            print_rows(f"{what} against {title}", peer, table, options.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "Fake-quantize"))
