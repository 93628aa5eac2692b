#pragma once

#include <cstdint>

#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/host_device.h"
#include "kernels/common/integer_math.h"
#include "kernels/cuda/warp.h"
#include "kernels/fake_quantize.h"

/// How the CUDA body of fake_quantize deals matrices to thread blocks: pure functions, the same on
/// the host (which counts tiles) and on the device (which finds its place).
///
/// A run is what one team of threads handles: the columns of one group in one row or, where rows
/// share scales, a segment of a row. Team members take quads of four neighbouring columns in turn,
/// or vectors of fake_quantize_vectors.cu. Which threads make up a team follows the storage, so
/// that neighbouring threads touch neighbouring addresses:
///
///   kWarps  a run along contiguous columns: as many of the block's warps as can hold it in
///           registers, 1, 2, 4 or 8; a longer run takes the block
///   kLane   contiguous rows elsewhere (Conv1D): lane l of each of the 8 warps works for row l of
///           32
namespace moq::kernels::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarpSize * kWarps;
constexpr int kQuad = 4;
constexpr int kHeldBytes = 128;          ///< that a thread can hold in registers
constexpr std::int64_t kSegment = 4096;  ///< columns of a run where rows share scales

enum class Team : std::uint8_t { kWarps, kLane };

struct Tiling {
  Team team;
  int warps;              ///< of a team
  std::int64_t run_size;  ///< columns; the last run of a row may be shorter
  std::int64_t runs_per_row;
  std::int64_t tiles;
};

MOQ_HOST_DEVICE inline Tiling tiling_of(const FakeQuantizeTensor& matrix) {
  Tiling tiling{};
  if (rows_share_scales(matrix)) {
    tiling.run_size = kSegment;
    tiling.runs_per_row = divide_up(matrix.cols, kSegment);
  } else {
    tiling.run_size = columns_per_group(matrix);
    tiling.runs_per_row = groups_per_row(matrix);
  }
  const std::int64_t runs = matrix.rows * tiling.runs_per_row;
  const std::int64_t held = kHeldBytes / static_cast<std::int64_t>(size_of(matrix.input_dtype));
  if (matrix.row_stride == 1 && matrix.col_stride != 1) {
    tiling.team = Team::kLane;
    tiling.warps = kWarps;
    tiling.tiles = divide_up(matrix.rows, kWarpSize) * tiling.runs_per_row;
  } else {
    tiling.team = Team::kWarps;
    tiling.warps = 1;
    while (tiling.warps < kWarps && tiling.run_size > tiling.warps * kWarpSize * held) {
      tiling.warps *= 2;
    }
    tiling.tiles = divide_up(runs, kWarps / tiling.warps);
  }
  return tiling;
}

/// One thread's part of a tile.
struct Place {
  std::int64_t row;
  std::int64_t run;    ///< within the row
  std::int64_t begin;  ///< first column of the run
  std::int64_t end;    ///< one past its last
  int member;          ///< of the team: takes quads member, member + members, ...
  int members;
  bool active;  ///< false: the tile reaches past the matrix here
};

MOQ_HOST_DEVICE inline Place place_of(const FakeQuantizeTensor& matrix, const Tiling& tiling,
                                      std::int64_t tile, int thread) {
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  Place place{};
  if (tiling.team == Team::kLane) {
    place.row = tile / tiling.runs_per_row * kWarpSize + lane;
    place.run = tile % tiling.runs_per_row;
    place.member = warp;
    place.members = kWarps;
  } else {
    const std::int64_t run = tile * (kWarps / tiling.warps) + warp / tiling.warps;
    place.row = tiling.runs_per_row == 1 ? run : run / tiling.runs_per_row;
    place.run = run - place.row * tiling.runs_per_row;
    place.member = warp % tiling.warps * kWarpSize + lane;
    place.members = tiling.warps * kWarpSize;
  }
  place.active = place.row < matrix.rows;
  place.begin = place.run * tiling.run_size;
  const std::int64_t end = place.begin + tiling.run_size;
  place.end = end < matrix.cols ? end : matrix.cols;
  return place;
}

struct LaunchConfig {
  unsigned blocks;
  unsigned threads;
};

/// Blocks stay and take tiles in turn: enough of them to fill every multiprocessor, however many
/// tiles there are. @param tiles at least 1
constexpr LaunchConfig fake_quantize_launch(std::int64_t tiles, int multiprocessors) {
  constexpr int kBlocksPerMultiprocessor = 8;
  const std::int64_t most = std::int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  return {static_cast<unsigned>(tiles < most ? tiles : most), kThreads};
}

}  // namespace moq::kernels::cuda
