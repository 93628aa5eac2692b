"""The logit probe: a few tokens and what the simulated model answers in FP32.

A 16-bit model rounds every product of a scale and a code. The engine does not, and neither does the
model that is asked here.

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

from moq import _C
from moq.activations import exported_inputs
from moq.caller_warning import warn_caller
from moq.input_grid import InputGrid
from moq.manifest import CONFIG_NAME, encode_floats
from moq.undisturbed import undisturbed

DEFAULT_LENGTH = 16


def _default_tokens(model: PreTrainedModel) -> list[int]:
    """Ids spread over the vocabulary by a multiplicative sequence, the same for every export.

    None of them is padding, which some models (RoBERTa) give another position than the engine.
    """
    config = model.config.get_text_config()
    vocab_size: int = config.vocab_size
    padding: int | None = getattr(config, "pad_token_id", None)
    tokens = [(1 + index * 2_654_435_761) % vocab_size for index in range(DEFAULT_LENGTH)]
    return [(token + 1) % vocab_size if token == padding else token for token in tokens]


def _in_single_precision(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """The model itself if it is FP32, otherwise one of the same weights that computes in FP32.

    Weights that are wider in `state` stay as wide. It is built anew: tables that a model computes
    once (rotary frequencies) have lost bits if the model was cast to a 16-bit dtype, and a cast
    back would not return them.
    """
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()):
        return model
    single: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    single.load_state_dict(dict(state))
    return single


def measure_probe(
    model: torch.nn.Module,
    tokens: Sequence[int] | None,
    state: Mapping[str, torch.Tensor],
    input_grids: Mapping[str, InputGrid],
) -> tuple[dict[str, Any] | None, str]:
    """Runs the model on `tokens` in evaluation mode and FP32.

    Args:
        model: a model that holds its simulated weights.
        tokens: token ids; None: DEFAULT_LENGTH ids spread over the vocabulary.
        state: the model's state dict under its plain names, with simulated values, those of a
            16-bit model before the rounding to its dtype.
        input_grids: layers that read INT8 inputs -> their grid. No other layer does, whatever
            quantizers the model holds.

    Returns:
        The manifest's ``probe`` and an empty reason; or None and the reason why the model has no
        probe: it is not a Hugging Face one, or does not answer token ids alone. The probe is
        ``{"input_ids", "output", "position", "values"}``: `output` is ``logits`` or
        ``last_hidden_state``; `values` holds the output at the last position, or of the whole
        sequence where the model gives one answer for it.

    Raises:
        Exception: what the model raises for the given `tokens`.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return None, f"{name} is not a Hugging Face model"
    try:
        asked = list(_default_tokens(model) if tokens is None else tokens)
        return _answer(model, asked, state, input_grids), ""
    except Exception as error:  # of the model's own code: it may want images, or a decoder's input
        if tokens is not None:
            raise
        reason = f"{name} does not answer input_ids alone ({type(error).__name__}: {error})"
        warn_caller(f"export: {reason}, so the checkpoint has no logit probe for moq verify")
        return None, reason


def _answer(
    model: PreTrainedModel,
    input_ids: list[int],
    state: Mapping[str, torch.Tensor],
    input_grids: Mapping[str, InputGrid],
) -> dict[str, Any]:
    """A probe with this question."""
    with undisturbed(model), torch.no_grad():
        single = _in_single_precision(model, state)
        single.train(False)
        device = next(single.parameters()).device
        with exported_inputs(single, input_grids):
            output = single(input_ids=torch.tensor([input_ids], device=device))
    kind = "logits" if "logits" in output else "last_hidden_state"
    values = output[kind][0]
    per_token = values.dim() == 2 and values.shape[0] == len(input_ids)
    return {
        "input_ids": input_ids,
        "output": kind,
        "position": len(input_ids) - 1 if per_token else None,
        "values": encode_floats(values[-1] if per_token else values),
    }


class EngineLacksModel(Exception):
    """The engine computes nothing like what config.json describes; the checkpoint may be good."""


def replay_probe(
    directory: Path, probe: Mapping[str, Any], policy: Path | None = None
) -> torch.Tensor:
    """The engine's answer to a probe, shaped as the recorded values.

    Args:
        directory: the checkpoint directory.
        probe: the manifest's `probe`.
        policy: a JSON policy for an architecture that the engine does not know.

    Raises:
        EngineLacksModel: if the engine has no such architecture, or not with these settings.
        moq.Error: if the checkpoint cannot be read.
    """
    engines = importlib.import_module("moq.inference").Engine
    try:
        engine = engines.from_pretrained(directory, policy=policy)
    except _C.Error as error:
        # What the engine objects to in a model's own config.json is a limit of the engine; what it
        # objects to in quantization_config, which moq wrote, is an error of the checkpoint.
        objection = str(error).removeprefix(f"{CONFIG_NAME}: ")
        is_limit = objection != str(error) and not objection.startswith("quantization_config")
        if policy is None and is_limit:
            raise EngineLacksModel(str(error)) from error
        raise
    input_ids, position = probe["input_ids"], probe["position"]
    output: torch.Tensor
    if probe["output"] == "logits" and position is not None:
        output = engine.forward([input_ids])[0][position]
    elif probe["output"] == "logits":
        output = engine.encode([input_ids]).logits[0]
    else:
        output = engine.encode([input_ids]).last_hidden_state[0][position]
    return output
