"""torch.ops.moq.read_bandwidth and read_once: what benchmarks hold weights' reading against."""

import functools
import operator

import pytest
import torch


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_reading_takes_time(device, prefetch):
    buffer = torch.zeros(1 << 24, dtype=torch.uint8, device=device)
    rate = torch.ops.moq.read_bandwidth(buffer, prefetch=prefetch)
    assert 1e8 < rate < 1e14  # bytes a second


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("words", [2, 4094, 100_002])
def test_reading_once_sees_every_word_also_in_a_graph(gpu, words, prefetch):
    buffer = torch.randint(-(2**62), 2**62, (words,), device=gpu)
    found = torch.zeros(1, dtype=torch.int64, device=gpu)
    expected = functools.reduce(operator.xor, buffer.tolist())
    torch.ops.moq.read_once(buffer, found, prefetch=prefetch)
    assert found.item() == expected
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.moq.read_once(buffer, found, prefetch=prefetch)
    graph.replay()
    assert found.item() == 0  # the exclusive or with itself


@pytest.mark.gpu
def test_reading_once_refuses_another_result(gpu):
    buffer = torch.zeros(16, device=gpu)
    with pytest.raises(TypeError, match="read_once: exclusive_or must be int64, got float32"):
        torch.ops.moq.read_once(buffer, torch.zeros(1, device=gpu), prefetch=False)
    with pytest.raises(ValueError, match="read_once: exclusive_or must be"):
        found = torch.zeros(2, dtype=torch.int64, device=gpu)
        torch.ops.moq.read_once(buffer, found, prefetch=False)
