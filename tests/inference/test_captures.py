"""CUDA graphs that a program captures beside the calls of a GPU engine."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import pytest
import torch
from models import open_fp32, relative_error, sequences

from moq import _C
from moq.inference import Engine

pytestmark = pytest.mark.gpu

PATIENCE = 120  # seconds


@contextmanager
def another_thread_captures() -> Iterator[None]:
    """Until this ends, which checks the graph, a thread captures in the mode that is the default.

    torch returns all the memory that it has in reserve when a capture begins.
    """
    graph, values = torch.cuda.CUDAGraph(), torch.ones(1000, device="cuda")
    began, may_end = Event(), Event()
    results, errors = [], []

    def capture() -> None:
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                doubled = values * 2
                torch.cuda._sleep(1000)
                began.set()
                assert may_end.wait(PATIENCE)
                results.append(doubled + 1)
        except BaseException as error:  # noqa: BLE001  (raised again in the test's thread)
            errors.append(error)
            began.set()

    thread = Thread(target=capture)
    thread.start()
    try:
        assert began.wait(PATIENCE)
        yield
    finally:
        may_end.set()
        thread.join()
    if errors:
        raise errors[0]
    graph.replay()
    assert torch.equal(results[0], torch.full_like(values, 3))


@pytest.mark.parametrize("name", ["llama", "gpt2_wide_heads"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_engine_opens_generates_and_ends_while_another_thread_captures(
    name, rows, model_directory, gpu
):
    prompts = sequences(*[20] * rows)
    options = {"device": gpu, "dtype": "int8"}
    with another_thread_captures():
        engine = Engine.from_pretrained(model_directory(name), **options)
        drawn = [engine.generate(prompts, 12) for _ in range(2)]  # then by captured steps only
        longer = engine.generate(sequences(*[60] * (rows + 1)), 12)  # frees graphs and a cache
        del engine
    expected = Engine.from_pretrained(model_directory(name), **options).generate(prompts, 12)
    assert drawn == [expected, expected]
    assert len(longer) == rows + 1


def test_encodings_are_right_while_another_thread_captures(model_directory, gpu):
    ids = torch.tensor(sequences(24, 24), device=gpu)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    expected = open_fp32(model_directory("bert"), gpu).encode(ids, mask)
    engine = open_fp32(model_directory("bert"), gpu)
    with another_thread_captures():
        found = [engine.encode(ids, mask) for _ in range(3)]  # the third time by a captured step
    for encoding in found:
        assert relative_error(encoding.mean, expected.mean) < 5e-6
        assert relative_error(encoding.logits, expected.logits) < 5e-6


def test_logits_are_right_while_another_thread_captures(model_directory, gpu):
    ids = torch.tensor(sequences(24, 24), device=gpu)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    expected = open_fp32(model_directory("llama"), gpu).forward(ids, mask)
    engine = open_fp32(model_directory("llama"), gpu)
    core = engine.core
    with another_thread_captures():
        found = engine.forward(ids, mask)
        cache = core.make_cache(1, 96)
        slots = [cache.allocate()]
        row = ids[:1]
        pieces = [core.forward(piece, [], cache, slots) for piece in (row[:, :9], row[:, 9:])]
        del cache
    assert relative_error(found, expected) < 5e-6
    assert relative_error(torch.cat(pieces), expected[0]) < 5e-6


CALLS = {
    "generate": lambda engine, ids: engine.generate(ids, 5),
    "forward": lambda engine, ids: engine.forward(ids, torch.ones_like(ids)),
    "encode": lambda engine, ids: engine.encode(ids, torch.ones_like(ids)),
    "make_cache": lambda engine, _: engine.core.make_cache(1, 8),
    "open": lambda engine, _: Engine.from_pretrained(engine.directory, device="cuda"),
    "core.generate": lambda engine, ids: engine.core.generate(ids, max_new_tokens=5),
    "core.forward": lambda engine, ids: engine.core.forward(ids),
    "core.encode": lambda engine, ids: engine.core.encode(ids),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_from_a_stream_that_is_being_captured_is_refused(call, model_directory, gpu):
    engine = Engine.from_pretrained(model_directory("llama"), device=gpu)
    ids = torch.tensor(sequences(7), device=gpu)
    expected = engine.generate(ids, 5)
    graph, values = torch.cuda.CUDAGraph(), torch.ones(1000, device=gpu)
    with torch.cuda.graph(graph):
        doubled = values * 2
        with pytest.raises(_C.Error, match=r"outside of CUDA graphs, got one on a stream of cuda:"):
            CALLS[call](engine, ids)
        result = doubled + 1
        assert engine.memory_report()["total"] > 0
        engine.core.release_graphs()
    assert engine.generate(ids, 5) == expected
    graph.replay()
    assert torch.equal(result, torch.full_like(values, 3))


def test_a_call_from_another_stream_than_the_captured_one_is_no_part_of_the_graph(
    model_directory, gpu
):
    engine = Engine.from_pretrained(model_directory("llama"), device=gpu)
    expected = engine.generate(sequences(7), 5)
    graph, values = torch.cuda.CUDAGraph(), torch.ones(1000, device=gpu)
    other = torch.cuda.Stream()
    with torch.cuda.graph(graph):
        doubled = values * 2
        with torch.cuda.stream(other):
            drawn = engine.generate(sequences(7), 5)
        result = doubled + 1
    assert drawn == expected
    graph.replay()
    assert torch.equal(result, torch.full_like(values, 3))


def test_a_capture_that_a_callback_begins_stops_the_generation_not_the_engine(model_directory, gpu):
    engine = Engine.from_pretrained(model_directory("llama"), device=gpu)
    expected = engine.generate(sequences(7), 5)
    graph, values = torch.cuda.CUDAGraph(), torch.ones(1000, device=gpu)

    def on_token(row, token):
        graph.capture_begin()
        return True

    with torch.cuda.stream(torch.cuda.Stream()):
        with pytest.raises(_C.Error, match="outside of CUDA graphs"):
            engine.core.generate(sequences(7), max_new_tokens=5, on_token=on_token)
        result = values * 3
        graph.capture_end()
    assert engine.generate(sequences(7), 5) == expected
    graph.replay()
    assert torch.equal(result, torch.full_like(values, 3))


def test_a_thread_that_waits_for_the_whole_gpu_leaves_the_engine_usable(model_directory, gpu):
    """CUDA breaks the capture of a step then; that of the next call goes well again."""
    engine = Engine.from_pretrained(model_directory("llama"), device=gpu)
    expected = engine.generate(sequences(7), 5)
    ended = Event()

    def wait() -> None:
        while not ended.is_set():
            with suppress(RuntimeError):  # a step is being captured
                torch.cuda.synchronize()

    thread = Thread(target=wait)
    thread.start()
    try:
        for _ in range(30):
            engine.core.release_graphs()
            with suppress(_C.Error):
                assert engine.generate(sequences(7), 5) == expected
    finally:
        ended.set()
        thread.join()
    assert engine.generate(sequences(7), 5) == expected
