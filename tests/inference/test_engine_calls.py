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


@pytest.mark.parametrize("call", ["generate", "forward", "encode"])
def test_a_callback_that_calls_its_own_engine_is_told_so(call, model_directory):
    core = Engine.from_pretrained(model_directory("llama")).core
    options = {"max_new_tokens": 4} if call == "generate" else {}

    def on_token(row, token):
        getattr(core, call)([[3, 4]], **options)
        return True

    with pytest.raises(_C.Error, match="must not call the engine that runs it"):
        core.generate([[3, 4]], max_new_tokens=4, on_token=on_token)
    assert len(core.generate([[3, 4]], max_new_tokens=4).rows[0].tokens) == 4


def test_a_communicator_outlives_its_engine(model_directory):
    communicator = Engine.from_pretrained(model_directory("llama")).core.communicator
    assert (communicator.rank, communicator.size) == (0, 1)
