"""Directories of models, made once per session."""

import sys
from collections.abc import Callable
from pathlib import Path

import models
import pytest
from decoders import WIDE_HEADS, write_decoder

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Callable[[str], Path]:
    """Maps the name of a small random model to a Hugging Face directory of it."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            if name in WIDE_HEADS:
                write_decoder(made[name], **WIDE_HEADS[name])
            else:
                models.save(name, models.build(name), made[name])
        return made[name]

    return directory


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The real SmolLM2-135M-Instruct: (directory, model, tokenizer)."""
    from pretrained import load_decoder

    directory = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_decoder()
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, model, tokenizer
