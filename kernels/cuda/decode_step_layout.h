#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/warp.h"

/// What the parts of the persistent decode step share: how it is cut, and where things lie.
namespace moq::kernels::cuda::step {

/// The projections of a layer, in their order.
enum Projection { kQkv, kOut, kUp, kDown };
constexpr int kProjections = 4;

// A thread block has so many warps that multiply, and one more that brings the weights.
constexpr int kWarps = 7;
constexpr int kConsumers = kWarps * kWarpSize;
constexpr int kThreads = kConsumers + kWarpSize;

constexpr unsigned kWholeWarp = 0xffffffffU;

constexpr int kHeadDim = 64;
constexpr int kSplits = 5;    // thread blocks that share the keys of a head
constexpr int kPieces = 4;    // hidden sizes that the feed-forward block is wide
constexpr int kMaxUnits = 5;  // blocks of 16 rows that a thread block has of a projection

// Columns of a block of the packed weight, words of four numbers in them, and the widest input.
constexpr int kBlockCols = kBlockBytes / kBlockRows;
constexpr int kBlockWords = kBlockCols / 4;
constexpr int kMaxColBlocks = 52;
constexpr int kMaxHeads = kMaxColBlocks * kBlockCols / kHeadDim;

// The ring in shared memory: a stage holds 16 rows of hidden_size columns, or keys and values.
constexpr int kStages = 7;
constexpr int kStageBytes = kMaxColBlocks * kBlockBytes;
constexpr int kHeadBytes = kHeadDim * 2;
constexpr int kStageKeys = kStageBytes / (2 * kHeadBytes);

// Pages of its keys, and pointers to weights, that a thread block keeps at hand.
constexpr int kHeldPages = 64;
constexpr int kMaxLayers = 128;

/// Rounds in which the warps take the column blocks of a row in turn.
constexpr int rounds_of(std::int64_t num_heads) {
  return static_cast<int>((num_heads * (kHeadDim / kBlockCols) + kWarps - 1) / kWarps);
}

/// Floats between rows of partial sums: an odd number of quads keeps the banks apart.
constexpr int kSumStride = 12;
constexpr int kSumRows = kMaxUnits * kBlockRows;
/// Floats of a warp's part of a head: the sums of its values, greatest score, sum of weights.
constexpr int kPartStride = kHeadDim + 4;

/// Column, of 16, that lies at a place of the exchanged words: four neighbours are what a lane's
/// run of the packed weight multiplies (linear_layout.h).
constexpr int column_at(int place) {
  return 2 * (place / 4) + place % 2 + 8 * (place / 2 % 2);
}

/// A projection's first row among those of a layer, in hidden sizes.
constexpr int first_row(int projection) {
  return projection == kQkv ? 0 : projection == kOut ? 3 : projection == kUp ? 4 : 8;
}
constexpr int kLayerRows = 9;  // hidden sizes

/// What the kernel is told.
struct Parameters {
  const std::uint8_t* const* weights;  ///< [layers, projections]
  const float2* rows;                  ///< [layers, kLayerRows * hidden]: scale and bias
  const float4* norms;         ///< [layers, 2, hidden / 4, 2]: weight and bias of a word's columns
  const std::int16_t* units;   ///< [projections, grid + 1]: first block of rows of a thread block
  char* exchange;              ///< decode_step_exchange.h
  std::uint32_t* layers_done;  ///< by all steps so far
  const std::uint16_t* input;
  std::uint16_t* output;
  std::uint16_t* keys;
  std::uint16_t* values;
  std::int64_t cache_stride;  ///< elements from layer to layer
  const std::int32_t* page_table;
  std::int64_t page_table_stride;
  const DeviceSequence* sequence;
  const std::int32_t* cache_row;
  std::int32_t layers;
  std::int32_t hidden;
  std::int32_t heads;
  std::int32_t col_blocks;  ///< of hidden
  float inverse_hidden;
  Activation activation;
  float epsilon;
};

}  // namespace moq::kernels::cuda::step
