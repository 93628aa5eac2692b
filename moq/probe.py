"""The logit probe: a few tokens and what the simulated model answers in FP32.

`moq.export` stores it, and `moq verify` asks the engine the same question.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moq.manifest import encode_floats

DEFAULT_LENGTH = 16


def _default_tokens(model: PreTrainedModel) -> list[int]:
    """Ids spread over the vocabulary by a multiplicative sequence, the same for every export."""
    vocab_size: int = model.config.get_text_config().vocab_size
    return [(1 + index * 2_654_435_761) % vocab_size for index in range(DEFAULT_LENGTH)]


def _in_single_precision(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if it is FP32, otherwise one of the same weights that computes in FP32.

    It is built anew: tables that a model computes once (rotary frequencies) have lost bits if the
    model was cast to a 16-bit dtype, and a cast back would not return them.
    """
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()):
        return model
    single: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    single.load_state_dict(model.state_dict())
    return single


def measure_probe(model: torch.nn.Module, tokens: Sequence[int] | None) -> dict[str, Any] | None:
    """Runs the model on `tokens` in evaluation mode and FP32, and returns the manifest's `probe`.

    Args:
        model: a model that takes `input_ids`, holding its simulated weights.
        tokens: token ids; None: DEFAULT_LENGTH ids spread over the vocabulary.

    Returns:
        ``{"input_ids", "output", "position", "values"}``: `output` is ``logits`` or
        ``last_hidden_state``; `values` holds the output at the last position, or of the whole
        sequence where the model gives one answer for it. None for a model that is not a Hugging
        Face one.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    input_ids = list(_default_tokens(model) if tokens is None else tokens)
    single = _in_single_precision(model)
    training = {module: module.training for module in single.modules()}
    try:
        single.train(False)
        with torch.no_grad():
            device = next(single.parameters()).device
            output = single(input_ids=torch.tensor([input_ids], device=device))
    finally:
        for module, was_training in training.items():
            module.training = was_training
    kind = "logits" if "logits" in output else "last_hidden_state"
    values = output[kind][0]
    per_token = values.dim() == 2 and values.shape[0] == len(input_ids)
    return {
        "input_ids": input_ids,
        "output": kind,
        "position": len(input_ids) - 1 if per_token else None,
        "values": encode_floats(values[-1] if per_token else values),
    }


def replay_probe(directory: Path, probe: Mapping[str, Any]) -> torch.Tensor:
    """The engine's answer to a probe, shaped as the recorded values.

    Args:
        directory: the checkpoint directory.
        probe: the manifest's `probe`.
    """
    engine = importlib.import_module("moq.inference").Engine.from_pretrained(directory)
    input_ids, position = probe["input_ids"], probe["position"]
    output: torch.Tensor
    if probe["output"] == "logits" and position is not None:
        output = engine.forward([input_ids])[0][position]
    elif probe["output"] == "logits":
        output = engine.encode([input_ids]).logits[0]
    else:
        output = engine.encode([input_ids]).last_hidden_state[0][position]
    return output
