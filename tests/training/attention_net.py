"""A net of which every form of the curvature is known, and its matrices."""

import copy

import torch
from reference.hessian import dense_hessian, empirical_fisher, gauss_newton
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from moq._C import FiniteDifferenceOperator


class Net(nn.Module):
    """Attention over 3 tokens of width 4, GELU and a head: small enough for a dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.checkpointing: bool | None = None  # use_reentrant

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing is None:
            x = self.mixed(x)
        else:
            x = checkpoint(self.mixed, x, use_reentrant=self.checkpointing)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x)


def losses_of(net, data, reduction="mean"):
    x, y = data
    return F.cross_entropy(net(x).flatten(0, 1), y, reduction=reduction)


def loss_fn_of(form, net):
    """What `measure` asks for, of each form."""

    def loss_fn(data):
        if form == "fisher":
            return losses_of(net, data, "none")
        outputs = net(data[0])
        loss = F.cross_entropy(outputs.flatten(0, 1), data[1])
        return (loss, outputs) if form == "gauss_newton" else loss

    return loss_fn


def double(net, data):
    return copy.deepcopy(net).double(), (data[0].double(), data[1])


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def like(vector, parameters):
    sizes = [p.numel() for p in parameters]
    return [v.view_as(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]


def differences(net, data, **options):
    """Finite differences over all parameters, with plain backward passes."""
    parameters = list(net.parameters())

    def gradient(block):
        with torch.enable_grad():
            return torch.autograd.grad(losses_of(net, data), [parameters[i] for i in block])

    return FiniteDifferenceOperator(gradient, parameters, **options)


def dense_of(form, net, data):
    """The whole matrix of a form, float64."""
    net, data = double(net, data)
    parameters = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        if form == "gauss_newton":
            return gauss_newton(
                lambda z: F.cross_entropy(z.flatten(0, 1), data[1]), net(data[0]), parameters
            )
        if form == "fisher":
            return empirical_fisher(losses_of(net, data, "none"), parameters)
        return dense_hessian(lambda: losses_of(net, data), parameters)
