"""Rows of a batch against the same rows alone, and the KV cache."""

import pytest
import torch
from models import (
    CACHE_TOLERANCES,
    cached_logits,
    open_fp32,
    relative_error,
    same_bits,
    sequences,
)

from moq import _C

ROWS = sequences(1, 7, 30, 16)

with_every_cache = pytest.mark.parametrize(
    ("device", "kv_cache_dtype"),
    [
        ("cpu", None),
        pytest.param("cuda", None, marks=pytest.mark.gpu),
        pytest.param("cuda", "int8", marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)


def padded(rows, side):
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask.long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked_lm"])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_padded_rows_equal_each_row_alone(name, side, dtype, model_directory, device):
    engine = open_fp32(model_directory(name), device, dtype=dtype)
    ids, mask = padded(ROWS, side)
    logits = engine.forward(ids, mask)
    for i, row in enumerate(ROWS):
        assert same_bits(device, logits[i][mask[i].bool()], engine.forward([row])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_logits(side, model_directory, device):
    ids, mask = padded(ROWS, side)
    logits = open_fp32(model_directory("llama"), device).forward(ids, mask)
    assert logits[mask == 0].abs().max() == 0


def test_more_tokens_than_are_computed_at_once_give_each_row_its_own_bits(model_directory, device):
    rows = sequences(*[1 + 7 * i % 96 for i in range(100)])
    assert sum(map(len, rows)) > 2 * 2048
    encoder = open_fp32(model_directory("bert"), device, dtype="int8")
    encoding = encoder.encode(rows)
    decoder = open_fp32(model_directory("llama"), device, dtype="int8")
    logits = decoder.forward(rows)
    for i in range(0, 100, 9):
        alone = encoder.encode([rows[i]])
        assert same_bits(device, encoding.last_hidden_state[i], alone.last_hidden_state[0])
        assert same_bits(device, encoding.pooled[i], alone.pooled[0])
        assert same_bits(device, encoding.logits[i], alone.logits[0])
        assert same_bits(device, logits[i], decoder.forward([rows[i]])[0])


def test_a_call_that_is_refused_leaves_the_cache_as_it_was(model_directory, device):
    core = open_fp32(model_directory("llama"), device).core
    cache = core.make_cache(100, 90)
    slots = [cache.allocate() for _ in range(100)]
    with pytest.raises(_C.Error, match="must fit into the KV cache's 90 positions, got 91"):
        core.forward(sequences(*[90] * 99, 91), [], cache, slots)
    assert {cache.length(slot) for slot in slots} == {0}


@pytest.mark.parametrize("max_batch", [1, 2, 4, 16])
def test_generated_rows_do_not_depend_on_the_batch(max_batch, model_directory, device):
    engine = open_fp32(model_directory("llama"), device, dtype="int8")
    together = engine.generate(ROWS, 20, max_batch=max_batch)
    assert [g.token_ids for g in together] == [engine.generate(r, 20).token_ids for r in ROWS]


def test_several_appended_tokens_equal_the_whole_sequence(model_directory, device):
    core = open_fp32(model_directory("llama"), device).core
    (row,) = sequences(23)
    logits = cached_logits(core, [row[:5], row[5:6], row[6:20], row[20:]])
    assert relative_error(logits, core.forward([row])) < 5e-6


@with_every_cache
def test_forked_sequence_continues_as_its_parent_would(kv_cache_dtype, model_directory, device):
    core = open_fp32(model_directory("gpt2"), device, kv_cache_dtype=kv_cache_dtype).core
    (row,) = sequences(12)
    cache = core.make_cache(2, 32)
    parent = cache.allocate()
    core.forward([row], [], cache, [parent])
    child = cache.fork(parent)
    continued = core.forward([[5, 6], [7, 8]], [], cache, [parent, child])
    cache.truncate(parent, 12)
    again = core.forward([[7, 8]], [], cache, [parent])
    assert same_bits(device, continued[2:], again, CACHE_TOLERANCES[kv_cache_dtype])


@with_every_cache
def test_reordered_rows_continue_their_sources(kv_cache_dtype, model_directory, device):
    core = open_fp32(model_directory("llama"), device, kv_cache_dtype=kv_cache_dtype).core
    rows = sequences(9, 74, 5)  # one of them longer than a page
    cache = core.make_cache(3, 96)
    slots = [cache.allocate() for _ in rows]
    core.forward(rows, [], cache, slots)
    slots = cache.reorder(slots, [1, 1, 0])
    assert [cache.length(slot) for slot in slots] == [74, 74, 9]
    logits = core.forward([[3], [4], [5]], [], cache, slots)
    for i, (source, token) in enumerate([(1, 3), (1, 4), (0, 5)]):
        alone = cached_logits(core, [[*rows[source], token]])[-1]
        assert relative_error(logits[i], alone) < CACHE_TOLERANCES[kv_cache_dtype]


@with_every_cache
def test_freed_slots_are_used_again(kv_cache_dtype, model_directory, device):
    core = open_fp32(model_directory("llama"), device, kv_cache_dtype=kv_cache_dtype).core
    cache = core.make_cache(2, 96)
    slots = [cache.allocate(), cache.allocate()]
    before, beside, after = sequences(90, 70, 75)  # more than a page
    core.forward([before, beside], [], cache, slots)
    cache.free(slots[0])
    assert cache.allocate() == slots[0]
    assert cache.num_free_slots == 0
    core.forward([after], [], cache, slots[:1])
    logits = core.forward([[5], [6]], [], cache, slots)
    for found, whole in zip(logits, ([*after, 5], [*beside, 6]), strict=True):
        alone = cached_logits(core, [whole])[-1]
        assert relative_error(found, alone) < CACHE_TOLERANCES[kv_cache_dtype]
