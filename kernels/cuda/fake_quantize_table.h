#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/fake_quantize_layout.h"
#include "kernels/cuda/fake_quantize_tiles.h"
#include "kernels/cuda/launch.h"
#include "kernels/fake_quantize.h"

/// What the launches of fake_quantize have in common: many matrices by value, dealt to thread
/// blocks tile by tile.
namespace moq::kernels::cuda {
namespace {

constexpr int kTableSize = 208;

/// The matrices of one launch. It travels by value: a launch may carry 32,764 bytes of parameters,
/// and a captured graph keeps them with its node.
struct Table {
  FakeQuantizeTensor tensors[kTableSize];
  std::int32_t number[kTableSize];          // of each in the call
  std::int64_t first_tile[kTableSize + 1];  // of each tensor; then the number of all
  std::int64_t first_slot[kTableSize];      // where its rows share scales
  std::int32_t size;
};

/// What a call has besides the matrices. All pointers are device memory.
struct Step {
  const std::int32_t* num_bits;  // [tensors of the call]
  const float* blend_ratio;      // likewise, or null
  const std::int64_t* step;      // [1] or null
  const float* skip;             // [1] or null
  GroupCollection* slots;        // of the groups of several rows that this call collects
  std::uint64_t seed;
};

constexpr std::size_t kMoreParameters = 128;  // that a kernel may have besides
static_assert(sizeof(Table) + sizeof(Step) + kMoreParameters <= 32764);

/// The part of a call that is not its matrices.
Step step_of(const FakeQuantizeArgs& args) {
  return {.num_bits = args.num_bits,
          .blend_ratio = args.blend_ratio,
          .step = args.step,
          .skip = args.skip,
          .slots = static_cast<GroupCollection*>(args.workspace),
          .seed = args.seed};
}

/// Calls body(tensor's index in the table, tile) for the tiles that are this block's.
template <typename Body>
__device__ void for_each_tile(const Table& table, const Body& body) {
  int tensor = 0;
  const std::int64_t tiles = table.first_tile[table.size];
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    while (tile >= table.first_tile[tensor + 1]) {
      ++tensor;
    }
    body(tensor, tile - table.first_tile[tensor]);
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, const Table& table, const Step& step, int multiprocessors,
            cudaStream_t stream, Arguments... arguments) {
  const std::int64_t tiles = table.first_tile[table.size];
  if (tiles == 0) {
    return;
  }
  const LaunchConfig config = fake_quantize_launch(tiles, multiprocessors);
  launch_in_order(kernel, config.blocks, config.threads, stream, table, step, arguments...);
}

bool is_collected_here(const FakeQuantizeTensor& matrix) {
  return rows_share_scales(matrix) && matrix.collected == nullptr;
}

std::int64_t default_tiles(const FakeQuantizeTensor& matrix) {
  return tiling_of(matrix).tiles;
}

/// Calls body(table) for tables of the matrices that are wanted.
/// @param tiles_of  a matrix's number of tiles
template <typename Wanted, typename Body, typename Tiles = decltype(default_tiles)>
void for_each_table(std::span<const FakeQuantizeTensor> tensors, const Wanted& wanted,
                    const Body& body, const Tiles& tiles_of = default_tiles) {
  Table table{};
  std::int64_t slot = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const FakeQuantizeTensor& matrix = tensors[i];
    if (wanted(matrix)) {
      table.tensors[table.size] = matrix;
      table.number[table.size] = static_cast<std::int32_t>(i);
      table.first_slot[table.size] = slot;
      table.first_tile[table.size + 1] = table.first_tile[table.size] + tiles_of(matrix);
      ++table.size;
    }
    slot += is_collected_here(matrix) ? num_groups(matrix) : 0;
    if (table.size == kTableSize || (table.size > 0 && i + 1 == tensors.size())) {
      body(table);
      table = {};
    }
  }
}

/// Calls body(kind, table) for tables of the matrices that `takes`, of one kind each: those that
/// one kernel serves.
template <typename Takes, typename KindOf, typename Body, typename Tiles = decltype(default_tiles)>
void for_each_kind(std::span<const FakeQuantizeTensor> tensors, const Takes& takes,
                   const KindOf& kind_of, const Body& body, const Tiles& tiles_of = default_tiles) {
  std::vector<decltype(kind_of(tensors.front()))> kinds;
  for (const FakeQuantizeTensor& matrix : tensors) {
    if (takes(matrix) && std::ranges::find(kinds, kind_of(matrix)) == kinds.end()) {
      kinds.push_back(kind_of(matrix));
    }
  }
  for (const auto& kind : kinds) {
    const auto wanted = [&](const FakeQuantizeTensor& matrix) {
      return takes(matrix) && kind_of(matrix) == kind;
    };
    for_each_table(
        tensors, wanted, [&](const Table& table) { body(kind, table); }, tiles_of);
  }
}

}  // namespace
}  // namespace moq::kernels::cuda
