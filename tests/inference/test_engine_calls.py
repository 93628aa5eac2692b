"""Calls of one engine from several threads, and what outlives it."""

from threading import Thread

import pytest
from models import sequences

from moq import _C
from moq.inference import Engine


def test_calls_from_several_threads_give_what_each_gives_alone(model_directory):
    core = Engine.from_pretrained(model_directory("llama"), dtype="int8").core
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


def test_questions_of_other_threads_wait_for_a_generation_to_end(model_directory):
    core = Engine.from_pretrained(model_directory("llama")).core
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
def test_a_callback_that_calls_its_own_engine_is_told_so(call, model_directory):
    core = Engine.from_pretrained(model_directory("llama")).core

    def on_token(row, token):
        call(core)
        return True

    with pytest.raises(_C.Error, match="must not call the engine that runs it"):
        core.generate([[3, 4]], max_new_tokens=4, on_token=on_token)
    assert len(core.generate([[3, 4]], max_new_tokens=4).rows[0].tokens) == 4


def test_a_communicator_outlives_its_engine(model_directory):
    communicator = Engine.from_pretrained(model_directory("llama")).core.communicator
    assert (communicator.rank, communicator.size) == (0, 1)
