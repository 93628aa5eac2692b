#pragma once

#include <cstdint>

#include "kernels/cuda/linear_layout.h"
#include "kernels/linear.h"

/// Many tokens times a weight on the tensor cores of compute capability 9.0 (sm_90a).
namespace moq::kernels::cuda {

/// Tiles of wgmma_linear, by rows of the weight and tokens. Each 64 rows are a warpgroup's. A
/// weight with groups has k128x160 in place of k128x256 and k128x192, k128x128 in place of
/// k192x128, and k64x64 in place of k64x128 and k64x96.
enum class WgmmaTile : std::uint8_t {
  k128x256,
  k128x192,
  k192x128,
  k128x128,
  k64x128,
  k64x96,
  k64x64,
  k64x32,
  k64x16
};

struct WgmmaChoice {
  WgmmaTile tile;
  /// Blocks of a cluster that share the columns: 1 to 8 of k64x16; 1, 2, 4 or 8 of k128x128 and
  /// k64x64; 1, 2 or 4 of k64x32 and, with one-byte weights, k64x96; 1 of the others. Fewer share
  /// them where there are not 64 columns for each.
  int split;
};

/// How a weight's rows are shared out: the first `rows` of them, a multiple of the tile's, and the
/// others. Tiles that fill the GPU but for a few are followed by smaller ones of what is left.
struct WgmmaPlan {
  WgmmaChoice first;
  std::int64_t rows;  ///< n or more: `rest` means nothing
  WgmmaChoice rest;
};

/// Whether wgmma_linear multiplies these, any number of tokens, on the current device.
bool can_wgmma(const DeviceLinearArgs& args, const DeviceLayout& layout);
WgmmaPlan choose_wgmma(const DeviceLinearArgs& args, const DeviceLayout& layout);
void wgmma_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, const WgmmaPlan& plan,
                  CUstream_st* stream);

}  // namespace moq::kernels::cuda
