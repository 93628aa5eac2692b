"""The rank correlation that benchmarks report: one, and the same for all."""

import pytest
from rank_correlation import rank_correlation


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [10, 20, 25], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 1, 2], [3, 4, 5], 0.75**0.5),
        ([2, 1, 1, 3], [0.5, 0.5, 0.25, 0.75], 5 / 6),
    ],
)
def test_equal_values_share_the_mean_of_their_ranks(one, other, expected):
    assert rank_correlation(one, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["accuracy_cells", "curvature_forms", "rounding_loss"])
def test_every_benchmark_shares_ranks_among_equals(name):
    module = pytest.importorskip(name, exc_type=ImportError)
    assert module.rank_correlation([1.0, 1.0, 2.0], [3.0, 4.0, 5.0]) == pytest.approx(0.75**0.5)
