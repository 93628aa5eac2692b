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
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("words", [2, 4096, 100_002, 5_000_002])
def test_reading_after_a_row_adds_the_rows_sum_for_each_16_bytes(gpu, words, prefetch):
    buffer = torch.zeros(words, dtype=torch.int64, device=gpu)
    buffer[-1] = 5
    row = torch.zeros(1602, dtype=torch.int64, device=gpu)
    found = torch.zeros(1, dtype=torch.int64, device=gpu)
    for i in range(20):  # each row is written right before
        row[i * 80] = 3 << i
        torch.ops.moq.read_once(buffer, found, prefetch=prefetch, after_row=row)
        of_row = functools.reduce(operator.xor, row.tolist()) if words // 2 % 2 else 0
        assert found.item() == 5 ^ of_row
        found.zero_()


@pytest.mark.gpu
def test_reading_once_refuses_another_result(gpu):
    buffer = torch.zeros(16, device=gpu)
    with pytest.raises(TypeError, match="read_once: exclusive_or must be int64, got float32"):
        torch.ops.moq.read_once(buffer, torch.zeros(1, device=gpu), prefetch=False)
    with pytest.raises(ValueError, match="read_once: exclusive_or must be"):
        found = torch.zeros(2, dtype=torch.int64, device=gpu)
        torch.ops.moq.read_once(buffer, found, prefetch=False)


@pytest.mark.gpu
def test_reading_once_refuses_a_row_elsewhere_and_a_partial_one(gpu):
    buffer = torch.zeros(16, device=gpu)
    found = torch.zeros(1, dtype=torch.int64, device=gpu)
    with pytest.raises(ValueError, match="read_once: after_row must be on"):
        torch.ops.moq.read_once(buffer, found, prefetch=True, after_row=torch.zeros(16))
    with pytest.raises(RuntimeError, match="the row's size must be a multiple of 16 bytes, got 4"):
        row = torch.zeros(1, device=gpu)
        torch.ops.moq.read_once(buffer, found, prefetch=True, after_row=row)
