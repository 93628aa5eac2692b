#pragma once

#include <cuda.h>

#include "kernels/cuda/linear_layout.h"
#include "kernels/linear.h"

/// Tensor maps of what wgmma_linear multiplies. Host code only.
namespace moq::kernels::cuda {

/// Columns of a step: a token's are the 128 bytes that a swizzle exchanges.
constexpr int kStepCols = 64;

struct WgmmaMaps {
  CUtensorMap tokens;       ///< [m, k], boxes of a step's columns
  CUtensorMap weight;       ///< [row blocks, bytes of a row block], boxes of a step's blocks
  CUtensorMap scales;       ///< [row blocks, groups * 16], boxes of some groups
  CUtensorMap zero_points;  ///< likewise
};

struct WgmmaBoxes {
  int tokens;
  int row_blocks;
  int groups;
};

/// @throws moq::Error if the driver has no tensor maps or refuses one.
WgmmaMaps wgmma_maps(const DeviceLinearArgs& args, const DeviceLayout& layout,
                     const WgmmaBoxes& boxes);

}  // namespace moq::kernels::cuda
