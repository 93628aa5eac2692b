"""Shapes of the models that the GPU benchmarks run, and directories of random weights for them.

A directory is a Hugging Face one, config.json and model.safetensors, as the engine and transformers
open it. Weights are drawn on the GPU and written tensor by tensor, so that a model need not fit
into the host's memory twice.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_GPT2 = 50257
Parameters = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """A model's config.json and the shapes of its parameters."""

    config: dict[str, Any]
    parameters: Parameters

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(sizes) for sizes in self.parameters.values())


def gpt2(hidden: int, layers: int, heads: int, positions: int, vocab: int = VOCAB_GPT2) -> Shape:
    """A GPT-2 of those sizes; its linear weights are [in, out]."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": True,
    }
    parameters: Parameters = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (positions, hidden),
    }
    for i in range(layers):
        layer = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            parameters |= _norm(f"{layer}{norm}", hidden)
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            parameters[f"{layer}{name}.weight"] = (rows, columns)
            parameters[f"{layer}{name}.bias"] = (columns,)
    return Shape(config, parameters | _norm("transformer.ln_f", hidden))


def llama(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    positions: int = 8192,
) -> Shape:
    """A Llama of those sizes, with Llama-3.1's rotation."""
    head_dim = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    parameters: Parameters = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        parameters |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{layer}self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, intermediate),
        }
    parameters |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return Shape(config, parameters)


def bert(hidden: int, layers: int, heads: int, vocab: int = 30522) -> Shape:
    """A BERT encoder of those sizes, without a pooler."""
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    parameters: Parameters = {
        "embeddings.word_embeddings.weight": (vocab, hidden),
        "embeddings.position_embeddings.weight": (512, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    parameters |= _norm("embeddings.LayerNorm", hidden)
    for i in range(layers):
        layer = f"encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", 4 * hidden, hidden),
            ("output.dense", hidden, 4 * hidden),
        ):
            parameters[f"{layer}{name}.weight"] = (rows, columns)
            parameters[f"{layer}{name}.bias"] = (rows,)
        parameters |= _norm(f"{layer}attention.output.LayerNorm", hidden)
        parameters |= _norm(f"{layer}output.LayerNorm", hidden)
    return Shape(config, parameters)


def _norm(name: str, hidden: int) -> Parameters:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


def draw(name: str, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random parameter in float16: norms near 1, the rest small."""
    device = generator.device
    numbers = 0.02 * torch.randn(sizes, generator=generator, device=device)
    if len(sizes) == 1 and name.endswith("weight"):
        numbers += 1
    return numbers.half()


def write(shape: Shape, directory: Path, device: str = "cuda") -> Path:
    """Writes config.json and model.safetensors with float16 weights; returns the directory."""
    generator = torch.Generator(device=device).manual_seed(0)

    def tensors() -> Iterator[Tensor]:
        for name, sizes in shape.parameters.items():
            yield draw(name, sizes, generator)

    directory.mkdir(parents=True, exist_ok=True)
    config = shape.config | {"torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _write_safetensors(directory / "model.safetensors", shape.parameters, tensors)
    return directory


def _write_safetensors(
    path: Path, parameters: Parameters, tensors: Callable[[], Iterator[Tensor]]
) -> None:
    """The file format's header, then the bytes of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, sizes in parameters.items():
        end = offset + 2 * math.prod(sizes)
        header[name] = {"dtype": "F16", "shape": list(sizes), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors():
            tensor.cpu().numpy().tofile(file)


def read(directory: Path, device: str = "cuda") -> dict[str, Tensor]:
    """The parameters of a directory."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors", device=device)
