"""Transformers in plain PyTorch, as one writes them for speed: the peers of the GPU benchmarks.

A decoder has a static KV cache, and its layers are compiled by torch.compile (inductor, with
coordinate-descent tuning); a decode step, embedding to greedy choice, is one CUDA graph. INT8 is
weight-only, the gpt-fast way: the weight is converted inside the compiled product, whose result is
multiplied by the scale of each row.

A layer is compiled once for all layers of a model. What fuses across two layers of a pre-norm
model, the residual addition with the next norm, is kept together: a layer takes the branch that it
has to add, so that its kernels are those of the model compiled as a whole (--whole-model of
gpu_decode.py compiles it that way, which takes minutes).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Cache = tuple[Tensor, Tensor]  # keys and values [batch, kv_heads, length, head_dim]
OPTIONS = {"coordinate_descent_tuning": True, "triton.unique_kernel_names": True}


def compile_for_speed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for the sizes of each call: as often as they change, or an error."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)


@dataclass
class Linear:
    """A projection with an optional bias; INT8 weights have a scale per row."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None
    scale: Tensor | None = None

    def quantized(self) -> "Linear":
        """The same with INT8 weights."""
        scale = self.weight.float().abs().amax(1) / 127
        codes = torch.round(self.weight.float() / scale[:, None]).clamp(-127, 127)
        return Linear(codes.to(torch.int8), self.bias, scale.to(self.weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias."""
        if self.scale is None:
            return F.linear(x, self.weight.to(x.dtype), _to(self.bias, x))
        product = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return product if self.bias is None else product + self.bias


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    """[batch, heads, tokens, head_dim] to [batch, tokens, hidden]."""
    grouped = query.shape[1] != keys.shape[1]
    output = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, enable_gqa=grouped, **how
    )
    return output.transpose(1, 2).flatten(2)


@dataclass
class Step:
    """What the layers of one step share."""

    positions: Tensor  # [tokens]
    mask: Tensor | None  # [tokens, cache length] bool; None: a prompt, causal, from position 0
    cos: Tensor | None = None  # [tokens, head_dim]
    sin: Tensor | None = None


def _append(cache: Tensor, new: Tensor, step: Step) -> Tensor:
    """Writes new keys or values to their positions; returns those to attend to."""
    cache[:, :, step.positions] = new
    return cache if step.mask is not None else new


# ------------------------------------------------------------------------------------- the families


@dataclass
class Gpt2Layer:
    """Weights of a GPT-2 layer."""

    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    out: Linear
    norm2: tuple[Tensor, Tensor]
    up: Linear
    down: Linear


def gpt2_layer(
    x: Tensor, branch: Tensor, layer: Gpt2Layer, step: Step, cache: Cache
) -> tuple[Tensor, Tensor]:
    """The stream and the branch that is to be added to it, behind the layer."""
    heads, head_dim = cache[0].shape[1], cache[0].shape[3]
    x = x + branch
    query, key, value = (
        part.unflatten(2, (heads, head_dim)).transpose(1, 2)
        for part in layer.qkv(_layer_norm(x, layer.norm1, 1e-5)).chunk(3, dim=-1)
    )
    keys, values = _append(cache[0], key, step), _append(cache[1], value, step)
    x = x + layer.out(_attend(query, keys, values, step.mask, is_causal=step.mask is None))
    hidden = F.gelu(layer.up(_layer_norm(x, layer.norm2, 1e-5)), approximate="tanh")
    return x, layer.down(hidden)


def _layer_norm(x: Tensor, norm: tuple[Tensor, Tensor], epsilon: float) -> Tensor:
    weight, bias = (tensor.to(x.dtype) for tensor in norm)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


@dataclass
class LlamaLayer:
    """Weights of a Llama layer; q, k and v, and gate and up, are one matrix each."""

    norm1: Tensor
    qkv: Linear
    out: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear


def _rotate(heads: Tensor, step: Step) -> Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads.float() * step.cos + turned * step.sin).to(heads.dtype)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    return (x.float() * scale).to(x.dtype) * weight.to(x.dtype)


def llama_layer(
    x: Tensor, branch: Tensor, layer: LlamaLayer, step: Step, cache: Cache
) -> tuple[Tensor, Tensor]:
    """The stream and the branch that is to be added to it, behind the layer."""
    kv_heads, head_dim = cache[0].shape[1], cache[0].shape[3]
    heads = x.shape[-1] // head_dim
    x = x + branch
    qkv = layer.qkv(_rms_norm(x, layer.norm1))
    query, key, value = (
        part.unflatten(2, (-1, head_dim)).transpose(1, 2)
        for part in qkv.split([n * head_dim for n in (heads, kv_heads, kv_heads)], dim=-1)
    )
    keys = _append(cache[0], _rotate(key, step), step)
    values = _append(cache[1], value, step)
    causal = step.mask is None
    attended = _attend(_rotate(query, step), keys, values, step.mask, is_causal=causal)
    x = x + layer.out(attended)
    gate, up = layer.gate_up(_rms_norm(x, layer.norm2)).chunk(2, dim=-1)
    return x, layer.down(F.silu(gate) * up)


class Decoder:
    """A decoder with random or given weights, and a static cache of all its positions."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], length: int) -> None:
        """Takes the parameters of gpu_models.read; `length` is the cache's."""
        self.is_llama = config["model_type"] == "llama"
        self.device = next(iter(weights.values())).device
        self.length = length
        self.layer_step: Callable[..., tuple[Tensor, Tensor]]
        if self.is_llama:
            self._read_llama(config, weights)
        else:
            self._read_gpt2(config, weights)

    def _read_gpt2(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        def linear(name: str) -> Linear:
            weight = weights[f"{name}.weight"].t().contiguous()
            return Linear(weight, weights[f"{name}.bias"])

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self.layer_step = gpt2_layer
        self.layers: list[Any] = []
        for i in range(config["n_layer"]):
            name = f"transformer.h.{i}"
            self.layers.append(
                Gpt2Layer(
                    norm(f"{name}.ln_1"),
                    linear(f"{name}.attn.c_attn"),
                    linear(f"{name}.attn.c_proj"),
                    norm(f"{name}.ln_2"),
                    linear(f"{name}.mlp.c_fc"),
                    linear(f"{name}.mlp.c_proj"),
                )
            )
        self.embedding = weights["transformer.wte.weight"]
        self.position_embedding = weights["transformer.wpe.weight"]
        self.final_norm: Any = norm("transformer.ln_f")
        self.head = Linear(self.embedding)
        self.kv_heads = config["n_head"]
        self.head_dim = config["n_embd"] // config["n_head"]

    def _read_llama(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        def joined(layer: str, *names: str) -> Linear:
            return Linear(torch.cat([weights[f"{layer}.{name}.weight"] for name in names]))

        self.layer_step = llama_layer
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            name = f"model.layers.{i}"
            self.layers.append(
                LlamaLayer(
                    weights[f"{name}.input_layernorm.weight"],
                    joined(name, *(f"self_attn.{p}_proj" for p in "qkv")),
                    joined(name, "self_attn.o_proj"),
                    weights[f"{name}.post_attention_layernorm.weight"],
                    joined(name, "mlp.gate_proj", "mlp.up_proj"),
                    joined(name, "mlp.down_proj"),
                )
            )
        self.embedding = weights["model.embed_tokens.weight"]
        self.position_embedding = None
        self.final_norm = weights["model.norm.weight"]
        self.head = Linear(weights["lm_head.weight"])
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        steps = torch.arange(0, self.head_dim, 2, device=self.device) / self.head_dim
        angle = torch.arange(self.length, device=self.device)[:, None] * (
            config["rope_theta"] ** -steps
        )
        self.cos, self.sin = (t.repeat(1, 2) for t in (angle.cos(), angle.sin()))

    def quantize(self) -> "Decoder":
        """Makes every projection INT8, the head too; the embedding table stays as it is."""
        for layer in self.layers:
            for name, value in vars(layer).items():
                if isinstance(value, Linear):
                    setattr(layer, name, value.quantized())
        self.head = self.head.quantized()
        return self

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float16) -> list[Cache]:
        """Zeros for each layer."""
        shape = (batch, self.kv_heads, self.length, self.head_dim)
        zeros = {"dtype": dtype, "device": self.device}
        return [(torch.zeros(shape, **zeros), torch.zeros(shape, **zeros)) for _ in self.layers]

    def embed(
        self, tokens: Tensor, positions: Tensor, dtype: torch.dtype, from_start: bool
    ) -> tuple[Tensor, Step]:
        """What goes into the first layer."""
        mask = None
        if not from_start:
            mask = torch.arange(self.length, device=self.device)[None] <= positions[:, None]
        step = Step(positions, mask)
        if self.is_llama:
            step.cos, step.sin = self.cos[positions], self.sin[positions]
        x = self.embedding[tokens].to(dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding[positions].to(dtype)
        return x, step

    def score(self, x: Tensor, branch: Tensor, last_only: bool) -> Tensor:
        """Logits, from what comes out of the last layer."""
        x = x + branch
        x = x[:, -1:] if last_only else x
        norm = self.final_norm
        return self.head(_rms_norm(x, norm) if self.is_llama else _layer_norm(x, norm, 1e-5))

    def predict(self, x: Tensor, branch: Tensor, last_only: bool) -> tuple[Tensor, Tensor]:
        """The same, and the most likely token."""
        logits = self.score(x, branch, last_only)
        return logits, logits.argmax(-1)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: list[Cache],
        dtype: torch.dtype = torch.float16,
        last_only: bool = True,
        from_start: bool = False,
        compiled: "Compiled | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [batch, tokens, vocab] and the most likely tokens.

        Args:
            tokens: ids [batch, tokens].
            positions: where they stand [tokens]; their keys are written there.
            cache: of make_cache.
            dtype: of all arithmetic; weights are converted layer by layer.
            last_only: those of the last token alone, [batch, 1, vocab].
            from_start: the tokens are a whole prompt: no others are attended to.
            compiled: the parts of this function, compiled; None: eager.
        """
        parts = compiled or Compiled(self.embed, self.layer_step, self.predict)
        x, step = parts.embed(tokens, positions, dtype, from_start)
        branch = torch.zeros_like(x)
        for layer, keys_and_values in zip(self.layers, cache, strict=True):
            x, branch = parts.layer(x, branch, layer, step, keys_and_values)
        return parts.predict(x, branch, last_only)


@dataclass
class Compiled:
    """The parts of Decoder.forward."""

    embed: Callable[..., tuple[Tensor, Step]]
    layer: Callable[..., tuple[Tensor, Tensor]]
    predict: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, decoder: Decoder) -> "Compiled":
        """Compiles each part for fixed sizes."""
        parts = (decoder.embed, decoder.layer_step, decoder.predict)
        return cls(*map(compile_for_speed, parts))


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of run(), which has run before, and what the captured run returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = run()
    return graph, result


class CompiledStep:
    """A decode step of a Decoder as one CUDA graph: every replay draws the next token greedily."""

    def __init__(self, decoder: Decoder, cache: list[Cache], whole_model: bool = False) -> None:
        """Compiles the parts of a step, or the whole of it, and captures it."""
        batch = cache[0][0].shape[0]
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        compiled = None if whole_model else Compiled.of(decoder)

        def step() -> tuple[Tensor, Tensor]:
            return decoder.forward(self.tokens, self.position, cache, compiled=compiled)

        run = compile_for_speed(step) if whole_model else step
        self.graph, (self.logits, self.next_tokens) = capture(run)

    def set(self, tokens: Tensor, position: int) -> None:
        """Says what the next replay reads."""
        self.tokens.copy_(tokens)
        self.position.fill_(position)


# -------------------------------------------------------------------------------------- the encoder


@dataclass
class BertLayer:
    """Weights of a BERT layer."""

    qkv: Linear
    out: Linear
    norm1: tuple[Tensor, Tensor]
    up: Linear
    down: Linear
    norm2: tuple[Tensor, Tensor]


def bert_layer(x: Tensor, layer: BertLayer, head_dim: int) -> Tensor:
    """[batch, tokens, hidden] behind the layer; no token is masked."""
    query, key, value = (
        part.unflatten(2, (-1, head_dim)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1)
    )
    x = _layer_norm(x + layer.out(_attend(query, key, value, None)), layer.norm1, 1e-12)
    return _layer_norm(x + layer.down(F.gelu(layer.up(x))), layer.norm2, 1e-12)


class Encoder:
    """BERT's encoder without its pooler."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Takes the parameters of gpu_models.read."""

        def joined(layer: str, *names: str) -> Linear:
            weight, bias = (
                torch.cat([weights[f"{layer}.{name}.{what}"] for name in names])
                for what in ("weight", "bias")
            )
            return Linear(weight, bias)

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self.head_dim = config["hidden_size"] // config["num_attention_heads"]
        self.tables = [
            weights[f"embeddings.{kind}_embeddings.weight"]
            for kind in ("word", "position", "token_type")
        ]
        self.embedding_norm = norm("embeddings.LayerNorm")
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            name = f"encoder.layer.{i}"
            self.layers.append(
                BertLayer(
                    joined(name, *(f"attention.self.{p}" for p in ("query", "key", "value"))),
                    joined(name, "attention.output.dense"),
                    norm(f"{name}.attention.output.LayerNorm"),
                    joined(name, "intermediate.dense"),
                    joined(name, "output.dense"),
                    norm(f"{name}.output.LayerNorm"),
                )
            )

    def forward(
        self,
        tokens: Tensor,
        dtype: torch.dtype = torch.float16,
        layer: Callable[..., Tensor] = bert_layer,
    ) -> Tensor:
        """Hidden states [batch, tokens, hidden] of ids [batch, tokens]."""
        words, positions, types = self.tables
        x = words[tokens].to(dtype) + positions[: tokens.shape[1]].to(dtype) + types[0].to(dtype)
        x = _layer_norm(x, self.embedding_norm, 1e-12)
        for weights in self.layers:
            x = layer(x, weights, self.head_dim)
        return x


def weight_bytes(shape_parameters: dict[str, tuple[int, ...]], bits: int) -> int:
    """Bytes of all matrices at a width: what a decode step must read."""
    matrices = (sizes for sizes in shape_parameters.values() if len(sizes) == 2)
    return sum(math.prod(sizes) for sizes in matrices) * bits // 8
