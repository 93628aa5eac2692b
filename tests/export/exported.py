"""Small models whose weights are simulated as training leaves them, for the tests beside."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from moq.export import QuantizedParameter, export_checkpoint
from moq.input_grid import is_static


@dataclass(frozen=True)
class Spec:
    """Grid of a weight; num_bits above 8 stays dense."""

    num_bits: int = 8
    mode: str = "symmetric"
    granularity: str = "per_channel"
    group_size: int = 0
    activations: str | None = None
    rounding: str = "nearest"
    scale: str = "absmax"


def learned_absmax(master: torch.Tensor, spec: Spec, transposed: bool) -> torch.Tensor:
    """What training might have learned: magnitudes that clip some weights."""
    _, scales, _ = torch.ops.moq.quantize(
        master.float(),
        8,
        granularity=spec.granularity,
        group_size=spec.group_size if spec.granularity in ("per_group", "per_rows") else 0,
        transposed=transposed,
    )
    return (scales.flatten() * 127 * 0.7).contiguous()


def simulate(
    master: torch.Tensor, spec: Spec, transposed: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The trained value of a master: the operator that training runs.

    `dtype` is that of the model, in which scales are stored; None: the master's.
    """
    if spec.scale == "learned":
        return torch.ops.moq.simulate(
            master,
            torch.tensor([spec.num_bits], dtype=torch.int32),
            absmax=learned_absmax(master, spec, transposed),
            granularity=spec.granularity,
            group_size=spec.group_size if spec.granularity in ("per_group", "per_rows") else 0,
            transposed=transposed,
        )
    return torch.ops.moq.fake_quantize(
        master,
        spec.num_bits,
        granularity=spec.granularity,
        group_size=spec.group_size if spec.granularity in ("per_group", "per_rows") else 0,
        mode=spec.mode,
        scale_rule=spec.scale,
        rounding=spec.rounding,
        seed=3,
        step=5,
        transposed=transposed,
        scale_dtype=dtype,
    ).to(dtype or master.dtype)


@torch.no_grad()
def quantize_modules(
    model: torch.nn.Module, specs: dict[str, Spec], dtype: torch.dtype | None = None
) -> list[QuantizedParameter]:
    """Replaces the weights of the modules named in `specs` (by full name or last part).

    With a `dtype` the present values are the masters of a model that has that dtype from then on.
    """
    quantized = []
    for name, module in model.named_modules():
        spec = specs.get(name) or specs.get(name.rpartition(".")[2])
        if spec is None or not name:
            continue
        transposed = isinstance(module, Conv1D)
        master = module.weight.detach().clone()
        module.weight.data = simulate(master, spec, transposed, dtype)
        quantized.append(
            QuantizedParameter(
                f"{name}.weight",
                master,
                module.weight.detach(),
                spec.num_bits,
                spec.mode,
                spec.granularity,
                spec.group_size,
                transposed,
                activations=spec.activations,
                scale=spec.scale,
                input_scale=0.03125
                if spec.activations is not None and is_static(spec.activations)
                else None,
                input_zero_point=-37 if spec.activations == "static_asymmetric" else None,
                absmax=learned_absmax(master, spec, transposed)
                if spec.scale == "learned"
                else None,
            )
        )
    if dtype is not None:
        for parameter in model.parameters():  # biases, and weights that are not quantized
            parameter.data = parameter.data.to(dtype)
    return quantized


def tiny_llama(dtype: torch.dtype = torch.float32, **options) -> transformers.LlamaForCausalLM:
    """Two layers; 4 heads, 2 of keys and values; sizes that no vector width divides."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(settings | options))
    model = transformers.LlamaForCausalLM(config)
    # Only the weights: a cast of the whole model would round the rotary frequencies too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def export_tiny_llama(directory: Path, seed: int = 0, **options) -> transformers.LlamaForCausalLM:
    """A tiny Llama at 8 bits, exported; the seed makes checkpoints that differ."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    quantized = quantize_modules(model, dict.fromkeys(LLAMA_LINEARS, Spec()))
    export_checkpoint(directory, model, quantized, **options)
    return model
