#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/decode_step_layout.h"

/// How the rows of a layer's projections are dealt to thread blocks. Host code.
namespace moq::kernels::cuda::step {

/// First block of 16 rows of each thread block, and their number: [projections, grid + 1].
using Units = std::vector<std::int16_t>;

/// Thread blocks of a step: one a multiprocessor, but no more than the up projection has blocks of
/// rows, since each has some (the exchange counts on it). 0: a decoder of so many heads is too wide
/// for so many multiprocessors.
int grid_of(std::int64_t num_heads, std::int64_t multiprocessors);

/// The output and the down projection have at most one unit a thread block, those of the same. What
/// these blocks have less of the other two makes up for it.
Units units_of(std::int64_t num_heads, int grid);

}  // namespace moq::kernels::cuda::step
