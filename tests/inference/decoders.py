"""Small random decoders made up of any traits of a spec, with a policy of their own."""

import json
from pathlib import Path
from typing import Any

import torch
from models import VOCAB_SIZE
from safetensors.torch import save_file
from torch import Tensor

# GPT-2 as the kernel of a whole decode step wants it: heads of 64, 4 times as wide within.
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "max_positions": 96,
    "norm": "layer_norm",
    "norm_place": "pre",
    "positions": "learned",
    "activation": "gelu_new",
    "has_head": True,
}

# Decoders of other kinds with heads of 64 columns, which the fast kernels of a GPU need.
WIDE_HEADS: dict[str, dict[str, Any]] = {
    "llama_wide_heads": {
        "hidden_size": 256,
        "num_heads": 4,
        "intermediate_size": 1024,
        "norm": "rms_norm",
        "positions": "rotary",
        "gated": True,
        "activation": "silu",
    },
    "bloom_wide_heads": {"positions": "alibi", "embedding_norm": True},
}

_BIASES = {
    "query": "qkv_bias",
    "key": "qkv_bias",
    "value": "qkv_bias",
    "attention_out": "out_bias",
    "gate": "ffn_bias",
    "up": "ffn_bias",
    "down": "ffn_bias",
}


def write_decoder(directory: Path, attends: float = 1.0, **traits: Any) -> Path:
    """Writes a model of GPT2_LIKE's traits, except those given; returns the path of its policy.

    Args:
        directory: an empty one.
        attends: factor of the attention's weights: more of it makes single tokens count more.
        traits: fields of the spec.
    """
    spec = GPT2_LIKE | traits
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, str] = {}

    def add(module: str, shape: tuple[int, ...], bias: bool, layers: int | None = None) -> None:
        is_norm = len(shape) == 1
        modules[module] = module if layers is None else f"{module}.{{layer}}"
        for layer in range(layers or 1):
            name = modules[module].format(layer=layer)
            weight = torch.randn(shape, generator=generator) * (0.2 if is_norm else 0.1)
            if module in ("query", "key", "value"):
                weight *= attends
            tensors[f"{name}.weight"] = weight + 1 if is_norm else weight
            if bias:
                tensors[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)

    hidden, inner, dim = spec["hidden_size"], spec["intermediate_size"], spec["head_dim"]
    layers, query = spec["num_layers"], spec["num_heads"] * dim
    norm_bias = spec["norm"] == "layer_norm" and spec.get("norm_bias", True)
    add("token_embedding", (spec["vocab_size"], hidden), False)
    if spec["positions"] == "learned":
        add("position_embedding", (spec["max_positions"], hidden), False)
    if spec.get("embedding_norm"):
        add("embedding_norm", (hidden,), norm_bias)
    if spec["norm_place"] == "pre":
        add("final_norm", (hidden,), norm_bias)
    add("head", (spec["vocab_size"], hidden), False)
    for norm in ("attention_norm", "ffn_norm"):
        add(norm, (hidden,), norm_bias, layers)
    if spec.get("qk_norm"):
        for norm in ("query_norm", "key_norm"):
            add(norm, (dim,), False, layers)
    shapes = {
        "query": (query, hidden),
        "key": (spec["num_kv_heads"] * dim, hidden),
        "value": (spec["num_kv_heads"] * dim, hidden),
        "attention_out": (hidden, query),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    for module, shape in shapes.items():
        if module != "gate" or spec.get("gated"):
            add(module, shape, spec.get(_BIASES[module], True), layers)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"architectures": ["MadeUp"]}))
    policy = directory / "policy.json"
    policy.write_text(
        json.dumps(
            {"name": "made_up", "architectures": ["MadeUp"], "spec": spec, "modules": modules}
        )
    )
    return policy
