// Which rows of a decode step's projections each thread block has.
#include "kernels/cuda/decode_step_plan.h"

#include <algorithm>
#include <numeric>

namespace moq::kernels::cuda::step {
namespace {

constexpr std::int64_t kUnitsOfHead = kHeadDim / kBlockRows;

int units_in(int projection, std::int64_t num_heads) {
  const int widths[kProjections] = {3, 1, kPieces, 1};  // in hidden sizes
  return static_cast<int>(widths[projection] * num_heads * kUnitsOfHead);
}

/// Makes the counts, each between `least` and kMaxUnits, sum up to `total`, by one at a time.
void even_out(std::vector<int>& counts, int total, int least) {
  const int grid = static_cast<int>(counts.size());
  int stride = 7;  // neighbours share what multiprocessors share
  while (std::gcd(stride, grid) != 1) {
    ++stride;
  }
  int missing = total - std::accumulate(counts.begin(), counts.end(), 0);
  const int change = missing > 0 ? 1 : -1;
  for (int block = 0; missing != 0; block = (block + stride) % grid) {
    int& count = counts[static_cast<std::size_t>(block)];
    if (change > 0 ? count < kMaxUnits : count > least) {
      count += change;
      missing -= change;
    }
  }
}

}  // namespace

int grid_of(std::int64_t num_heads, std::int64_t multiprocessors) {
  const std::int64_t up = units_in(kUp, num_heads);
  const std::int64_t grid = std::min(multiprocessors, up);
  const bool fits =
      num_heads * kSplits <= grid && units_in(kOut, num_heads) <= grid && up <= grid * kMaxUnits;
  return fits ? static_cast<int>(grid) : 0;
}

Units units_of(std::int64_t num_heads, int grid) {
  Units units;
  const int owned = units_in(kOut, num_heads);
  const auto owns = [&](int block) {
    return (block + 1) * owned / grid - block * owned / grid;  // the last block has one
  };
  for (int projection = 0; projection < kProjections; ++projection) {
    const int total = units_in(projection, num_heads);
    const int each = total / grid;
    std::vector<int> counts(static_cast<std::size_t>(grid));
    for (int block = 0; block < grid; ++block) {
      int& count = counts[static_cast<std::size_t>(block)];
      const bool owner = owns(block) != 0;
      switch (projection) {
        case kQkv:
          count = std::min(owner ? each : each + 1, kMaxUnits);
          break;
        case kUp:
          count = owner ? std::max(each - 1, 1) : std::min(each + 2, kMaxUnits);
          break;
        default:
          count = owner ? 1 : 0;
      }
    }
    even_out(counts, total, projection == kUp ? 1 : 0);
    int first = 0;
    for (const int count : counts) {
      units.push_back(static_cast<std::int16_t>(first));
      first += count;
    }
    units.push_back(static_cast<std::int16_t>(first));
  }
  return units;
}

}  // namespace moq::kernels::cuda::step
