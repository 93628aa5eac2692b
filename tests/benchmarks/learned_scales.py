"""Speed of the gradient of learned step sizes, over all linear weights of a model, one by one.

The backward pass of a simulated weight reads the weight and the gradient of the simulated one, and
writes the gradient of the weight; those of the scales are sums over their groups. Peers:

  copy      the copy bandwidth in the same run, for the bytes that are read and written
  composed  the same arithmetic composed of torch's operators, weight by weight
  compiled  that under torch.compile (GPU)

Competitors take turns, as in fake_quantize.py.
"""

import sys

import gpu
import torch
from fake_quantize import COPY_BYTES, DTYPES, MODELS, Call, Weights, main, seconds_of
from report import Row

CASES = {
    "per channel": {},
    "per channel, Conv1D storage": {"transposed": True},
    "per group of 64": {"granularity": "per_group", "group_size": 64},
    "per tensor": {"granularity": "per_tensor"},
}
NUM_BITS = 4


def composed(
    incoming: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of kernels/learned_scale.h; a group is a run of the row-major matrix."""
    matrix, grad = (t.t() if transposed else t for t in (weight, incoming))
    groups, grad = (t.reshape(len(absmax), -1).float() for t in (matrix, grad))
    qmax = 2 ** (NUM_BITS - 1) - 1
    scale = (absmax.abs() / qmax)[:, None]
    position = groups * scale.reciprocal()
    rounded = position.round()
    inside = rounded.abs() <= qmax
    slope = torch.where(inside, rounded - position, position.sign() * qmax)
    to_weight = (grad * inside).to(weight.dtype).reshape(matrix.shape)
    to_absmax = (grad * slope).sum(1) / qmax * torch.where(absmax < 0, -1.0, 1.0)
    return to_weight.t() if transposed else to_weight, to_absmax


class Gradients:
    """The weights of a model with gradients to bring through them, some copies of all.

    Args:
        weights: The model's.
        case: One of CASES.
    """

    def __init__(self, weights: Weights, case: str) -> None:
        """Draws the gradients; the largest weights lie beyond their scale's."""
        self.arguments = CASES[case]
        self.transposed = bool(self.arguments.get("transposed"))
        self.num_bits = torch.tensor([NUM_BITS], dtype=torch.int32, device=weights.device)
        self.operands = [[self._operands(w) for w in ws] for ws in weights.masters]
        self.num_bytes = 3 * sum(w.nbytes for w in weights.masters[0])

    def _operands(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns = weight.shape
        groups = {"per_tensor": 1, "per_group": rows * columns // 64}.get(
            str(self.arguments.get("granularity")), rows
        )
        absmax = 0.7 * weight.float().reshape(groups, -1).abs().amax(1)
        stored = weight.t().contiguous() if self.transposed else weight
        return torch.randn_like(stored), stored, absmax

    def moq(self, i: int) -> None:
        """One kernel call a weight."""
        for incoming, weight, absmax in self.operands[i]:
            torch.ops.moq.simulate_gradient(
                incoming, weight, self.num_bits, absmax, **self.arguments
            )

    def composition(self) -> Call:
        """Torch's operators."""
        return lambda i: [composed(*o, self.transposed) for o in self.operands[i]]

    def compiled(self) -> Call:
        """One kernel for each shape, or a few."""
        torch._dynamo.reset()
        call = torch.compile(composed, dynamic=False)
        return lambda i: [call(*o, self.transposed) for o in self.operands[i]]


def measure(model: str, turns: int, device: str) -> tuple[list[Row], list[Row]]:
    """Rows against the copy bandwidth and rows against the composition."""
    against_copy, against_others = [], []
    large = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(large)
    for dtypes in DTYPES:
        if len({*DTYPES[dtypes]}) > 1:
            continue  # a gradient has its weight's dtype
        weights = Weights(MODELS[model], dtypes, device)
        for case in CASES:
            gradients = Gradients(weights, case)
            calls: dict[str, Call] = {
                "moq": gradients.moq,
                "copy": lambda i: target.copy_(large),
                "composed": gradients.composition(),
            }
            if device == "cuda" and case == "per channel":
                calls["compiled"] = gradients.compiled()
            times_of = seconds_of(calls, weights.copies, turns, device)
            seconds = {name: min(times) for name, times in times_of.items()}
            copied = 2 * COPY_BYTES[device] / seconds["copy"] / 1e9
            rate = gradients.num_bytes / seconds["moq"] / 1e9
            name = f"{model} {dtypes} {case}"
            note = f"({1e3 * seconds['moq']:.3f} ms)"
            against_copy.append(Row(name, rate, copied, "GB/s", note))
            for peer in ("composed", "compiled"):
                if peer in calls:
                    times = (1e3 * seconds["moq"], 1e3 * seconds[peer])
                    against_others.append(Row(f"{name}, {peer}", *times, "ms"))
            del gradients, calls
        del weights
        gpu.progress(f"{model} {dtypes}")
    return against_copy, against_others


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "Learned scales"))
