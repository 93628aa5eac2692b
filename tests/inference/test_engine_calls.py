"""Calls of one engine from several threads, and what outlives it."""

from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from models import cached_logits, open_fp32, same_bits, sequences

from moq import _C
from moq.inference import Engine


def test_calls_from_several_threads_give_what_each_gives_alone(model_directory, device):
    core = Engine.from_pretrained(model_directory("llama"), device=device, dtype="int8").core
    rows = sequences(40, 3, 17, 60)
    alone = [core.generate([row], max_new_tokens=30).rows[0].tokens for row in rows]
    got = {}

    def work(i):
        for _ in range(10):
            got.setdefault(i, []).append(core.generate([rows[i]], max_new_tokens=30).rows[0].tokens)

    threads = [Thread(target=work, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: [tokens] * 10 for i, tokens in enumerate(alone)}


def test_different_calls_at_once_give_what_each_gives_alone(model_directory, device):
    core = open_fp32(model_directory("llama"), device).core
    rows = sequences(40, 3, 17, 60)
    calls = [
        lambda: torch.tensor(core.generate(rows, max_new_tokens=20).rows[3].tokens),
        lambda: torch.tensor(core.generate(rows[:1], max_new_tokens=20).rows[0].tokens),
        lambda: core.forward(rows[1:3]),
        lambda: core.encode(rows).last_hidden_state,
        lambda: cached_logits(core, [rows[3][:50], *([token] for token in rows[3][50:])]),
    ]
    alone = [call() for call in calls]
    got = [[] for _ in calls]

    def work(i):
        for _ in range(6):
            got[i].append(calls[i]())

    threads = [Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results) for results in got] == [6] * len(calls)
    for results, expected in zip(got, alone, strict=True):
        assert all(same_bits(device, result, expected) for result in results)


def test_questions_of_other_threads_wait_for_a_generation_to_end(model_directory, device):
    core = Engine.from_pretrained(model_directory("llama"), device=device).core
    answers = []

    def ask():
        answers.append((core.memory_report(), core.decode_kernels(), core.make_cache(1, 8)))

    thread = Thread(target=ask)
    unanswered = []

    def on_token(row, token):
        if thread.ident is None:
            thread.start()
        unanswered.append(not answers)
        return True

    core.generate([[3, 4]], max_new_tokens=20, on_token=on_token)
    thread.join()
    assert all(unanswered) and len(unanswered) == 20
    assert answers[0][0]["kv_cache"] > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda core: core.generate([[3, 4]], max_new_tokens=4),
        lambda core: core.forward([[3, 4]]),
        lambda core: core.encode([[3, 4]]),
        lambda core: core.make_cache(1, 8),
        lambda core: core.memory_report(),
    ],
)
def test_a_callback_that_calls_its_own_engine_is_told_so(call, model_directory, device):
    core = Engine.from_pretrained(model_directory("llama"), device=device).core

    def on_token(row, token):
        call(core)
        return True

    with pytest.raises(_C.Error, match="must not call the engine that runs it"):
        core.generate([[3, 4]], max_new_tokens=4, on_token=on_token)
    assert len(core.generate([[3, 4]], max_new_tokens=4).rows[0].tokens) == 4


def test_ids_that_change_their_lists_when_read_are_those_of_the_call(model_directory, device):
    core = Engine.from_pretrained(model_directory("llama"), device=device).core
    rows = [[5, 3, *range(40)], [7, 8]]
    expected = core.forward(rows)

    class Shrinking:
        def __index__(self):
            rows[0].clear()
            rows.clear()
            return 5

    rows[0][0] = Shrinking()
    assert same_bits(device, core.forward(rows), expected)


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda table: table,
        lambda table: table.int(),
        lambda table: table.t().contiguous().t(),
        lambda table: table.repeat_interleave(2, 1)[:, ::2],
        lambda table: torch.stack([table, table])[1],
        lambda table: table[:, :1].expand(2, 3),
    ],
    ids=["int64", "int32", "columns", "every second", "offset", "one column"],
)
def test_a_tensor_of_ids_is_read_however_it_lies(laid_out, model_directory, device):
    core = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device).core
    ids = laid_out(torch.tensor([[5, 9, 2], [7, 1, 30]], device=device))
    types = laid_out(torch.tensor([[0, 1, 1], [1, 0, 0]], device=device))
    expected = core.encode(ids.tolist(), types.tolist()).last_hidden_state
    assert same_bits(device, core.encode(ids, types).last_hidden_state, expected)


def test_a_refused_call_leaves_nothing_to_the_next(model_directory, device):
    core = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device).core
    expected = core.encode([[5, 9, 2]]).last_hidden_state
    for ids, types, message in (
        ([[7, 1], [30, -1]], [], r"a token must lie in \[0, \d+\), got -1"),
        ([[7, 1], [2**40, 3]], [], "got 1099511627776"),
        ([[7, 1], [30, 2]], [[0, 0], [0, 9]], r"a token type must lie in \[0, \d+\), got 9"),
        ([[7, 1], [30, 2]], [[0, 0], [-1, 0]], "a token type must .* got -1"),
        ([[7, 1], []], [], "got none in sequence 1"),
        (torch.zeros(2, 0, dtype=torch.long), [], "got none in sequence 0"),
    ):
        with pytest.raises(_C.Error, match=message):
            core.encode(ids, types)
        assert same_bits(device, core.encode([[5, 9, 2]]).last_hidden_state, expected)


@pytest.mark.parametrize("lengths", [(4096, 4096), (4096, 100)])
def test_means_over_many_tokens_are_as_exact_as_pairwise_sums(lengths, model_directory):
    states = 1 + 0.5 * torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(0))
    encoding = SimpleNamespace(last_hidden_state=states, pooled=None, logits=None)
    core = SimpleNamespace(
        vocab_size=97, outside_captures=nullcontext, encode=lambda rows, types: encoding
    )
    found = Engine(core, model_directory("llama"), None).encode([[3] * n for n in lengths]).mean
    expected = torch.stack([part.double().mean(0) for part in states.split(lengths)])
    assert (found - expected).abs().max() < 5e-7 * expected.abs().max()


def test_a_communicator_outlives_its_engine(model_directory, device):
    communicator = Engine.from_pretrained(model_directory("llama"), device=device).core.communicator
    assert (communicator.rank, communicator.size) == (0, 1)


def test_an_engine_is_shown_with_what_it_holds(model_directory, device):
    directory = model_directory("llama")
    shown = repr(Engine.from_pretrained(directory, device=device, dtype="int8"))
    computed = "float16" if device == "cuda" else "float32"
    assert shown.startswith(f"Engine('{directory}', LlamaForCausalLM, int8")
    assert f"{computed} activations, {device}" in shown
