"""The peers of the GPU benchmarks compute what transformers and the engine compute."""

from pathlib import Path

import gpu_models
import pytest
import torch
from gpu_peers import Compiled, Decoder, Encoder
from transformers import AutoModel, AutoModelForCausalLM

from moq.inference import Engine

SHAPES = {
    "gpt2": lambda: gpu_models.gpt2(48, 3, 6, positions=96, vocab=97),
    "llama": lambda: gpu_models.llama(48, 3, 6, 2, 84, vocab=97, positions=96),
}
TOKENS = 17


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 97, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def write(shape: gpu_models.Shape, directory: Path) -> dict[str, torch.Tensor]:
    """A directory of random weights, read back."""
    return gpu_models.read(gpu_models.write(shape, directory, "cpu"), "cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_a_decoder_gives_the_logits_of_transformers(name, ids, tmp_path):
    shape = SHAPES[name]()
    decoder = Decoder(shape.config, write(shape, tmp_path), length=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = model(ids).logits
    positions = torch.arange(TOKENS)
    cache = decoder.make_cache(2, torch.float32)
    prompt, _ = decoder.forward(
        ids, positions, cache, torch.float32, last_only=False, from_start=True
    )
    torch.testing.assert_close(prompt, expected, rtol=1e-5, atol=1e-6)

    torch._dynamo.reset()
    cache = decoder.make_cache(2, torch.float32)
    decoder.forward(ids[:, :-1], positions[:-1], cache, torch.float32)
    parts = (decoder.embed, decoder.layer_step, decoder.predict)
    compile_once = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    compiled = Compiled(*(torch.compile(part, **compile_once) for part in parts))
    with torch._dynamo.config.patch(error_on_recompile=True):  # one layer's code serves all
        step, tokens = decoder.forward(
            ids[:, -1:], positions[-1:], cache, torch.float32, compiled=compiled
        )
    torch.testing.assert_close(step[:, 0], expected[:, -1], rtol=1e-5, atol=1e-6)
    assert torch.equal(tokens[:, 0], expected[:, -1].argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_an_int8_decoder_has_the_error_of_the_engine(name, ids, tmp_path):
    shape = SHAPES[name]()
    decoder = Decoder(shape.config, write(shape, tmp_path), length=32).quantize()
    cache = decoder.make_cache(2, torch.float32)
    logits, _ = decoder.forward(
        ids, torch.arange(TOKENS), cache, torch.float32, last_only=False, from_start=True
    )
    engine = Engine.from_pretrained(tmp_path, device="cpu", dtype="int8")
    spread = logits.abs().max().item()
    torch.testing.assert_close(logits, engine.forward(ids), rtol=0, atol=2e-3 * spread)


@torch.no_grad()
def test_the_encoder_gives_the_states_of_transformers(ids, tmp_path):
    shape = gpu_models.bert(48, 3, 6, vocab=97)
    encoder = Encoder(shape.config, write(shape, tmp_path))
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, add_pooling_layer=False)
    expected = model(ids).last_hidden_state
    torch.testing.assert_close(encoder.forward(ids, torch.float32), expected, rtol=1e-5, atol=1e-6)
