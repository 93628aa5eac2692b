"""A tiny decoder and the loop that trains it, shared by the tests of the optimizer."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moq
from moq.sharding import whole_tensor

VOCABULARY = 13

#: From 9 to 4 bits by four fifths of the steps: a configuration that drops again and again.
FALLING = {"start_bits": 9, "target_bits": 4, "schedule": {"finish_at": 0.8}}
FALLING_STOCHASTIC = FALLING | {"rounding": "stochastic"}

# Matrices of a few hundred elements gain nothing from threads, and lose much when cores are shared.
torch.set_num_threads(1)


class Layer(nn.Module):
    """Attention-like mixing and a gated feed-forward, with the names that real models use."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden)
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x)
        gated = nn.functional.silu(self.gate_proj(self.norm(x))) * self.up_proj(x)
        return x + self.down_proj(gated)


class Decoder(nn.Module):
    def __init__(self, layers: int = 2, hidden: int = 12, intermediate: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Layer(hidden, intermediate) for _ in range(layers))
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class CausalDecoder(Decoder):
    """The decoder with the call that transformers' Trainer makes."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(input_ids)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        )
        return {"loss": loss, "logits": logits}


class Recorder:
    """Any object with one method is a logger; this one keeps what it hears, by step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.steps[step] = self.steps.get(step, {}) | scalars


def tiny_llama(dtype: torch.dtype = torch.float32, layers: int = 2, **settings) -> nn.Module:
    """The same small Llama each time, with a config that exports and the engine take."""
    import transformers

    torch.manual_seed(0)
    settings = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
        "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    } | settings  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    for parameter in model.parameters():  # not the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    return model


class Logits(nn.Module):
    """Makes a transformers model look like the decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).logits


def batch(step: int) -> torch.Tensor:
    """Tokens of one batch, [4, 6]; the same for the same step."""
    return torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(step))


class OwnSquare(torch.autograd.Function):
    """x²; heirs say how its backward pass computes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x


class OnceDifferentiable(OwnSquare):
    """x², whose backward pass computes as a fused kernel does: outside autograd."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 2 * gradient * x


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = loss_of(model, batch(step))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]
) -> list[float]:
    """Losses of some steps."""
    return [train_step(model, optimizer, step) for step in steps]


def through_a_file(state: object) -> Any:
    """Writes and reads as trainers do: no code may come out of the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_gradients(*values: torch.Tensor) -> list[nn.Parameter]:
    """Parameters of these values, each with a gradient of ones."""
    weights = [nn.Parameter(value) for value in values]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return weights


def wrap(model: nn.Module, config: dict, total_steps: int = 12, **options) -> moq.MoQOptimizer:
    """Wraps an AdamW (`inner`) over all parameters; other options are MoQOptimizer's."""
    lr, eps = options.pop("lr", 1e-2), options.pop("eps", 1e-8)
    adamw = options.pop("inner", torch.optim.AdamW)(model.parameters(), lr=lr, eps=eps)
    options = {"verbose": False} | options
    return moq.MoQOptimizer(adamw, model, config, total_steps=total_steps, **options)


def masters(optimizer: moq.MoQOptimizer) -> dict[str, torch.Tensor]:
    """Masters by parameter name, as the state shows them."""
    state = optimizer.state
    return {
        name: state[parameter]["moq_master"]
        for name, parameter in optimizer.model.named_parameters()
        if "moq_master" in state[parameter]
    }


def copies(optimizer: moq.MoQOptimizer) -> dict[str, torch.Tensor]:
    """Masters as they are now, by parameter name."""
    return {name: master.detach().clone() for name, master in masters(optimizer).items()}


def name_hash(name: str) -> int:
    """FNV-1a, 32 bits, as a signed 32-bit integer would not be: 0 to 2^32 - 1."""
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def snapped(optimizer: moq.MoQOptimizer) -> dict[str, torch.Tensor]:
    """What the simulated values must be: the masters through the CPU's operator, one by one."""
    matched = {m.name: m for m in optimizer._masters.matched}
    result = {}
    for name, master in masters(optimizer).items():
        m = matched[name]
        dtype = optimizer.model.get_parameter(name).dtype
        result[name] = torch.ops.moq.fake_quantize(
            whole_tensor(master.detach()).cpu(),
            optimizer.num_bits[name],
            granularity=m.granularity,
            group_size=m.group_size,
            mode=m.spec.mode,
            rounding=m.spec.rounding,
            scale_rule=m.spec.scale,
            seed=optimizer.config.seed,
            step=optimizer.steps,
            name_hash=name_hash(name),
            transposed=m.transposed,
            scale_dtype=dtype,
        ).to(dtype)
    return result


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compares two sets of tensors bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_simulated(optimizer: moq.MoQOptimizer) -> None:
    """Asserts that the model holds exactly the masters' points on the grid."""
    expected = snapped(optimizer)
    parameters = {name: optimizer.model.get_parameter(name).detach() for name in expected}
    actual = {name: whole_tensor(parameter).cpu() for name, parameter in parameters.items()}
    assert_same(actual, expected)


def in_processes(
    worker: Path, world_size: int, directory: Path, backend: str = "gloo"
) -> list[dict[str, str]]:
    """Starts a worker as every rank; they meet through a file. Returns what each has found."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(directory), str(rank), str(world_size), backend],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for rank, process in enumerate(processes):
            try:
                output, _ = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                raise AssertionError(f"rank {rank} did not end:\n{output[-4000:]}") from None
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(world_size)
    ]
