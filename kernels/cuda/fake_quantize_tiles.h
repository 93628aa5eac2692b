#pragma once

#include <cstdint>

#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/host_device.h"
#include "kernels/common/integer_math.h"
#include "kernels/fake_quantize.h"

/// How the CUDA body of fake_quantize deals matrices to thread blocks: pure functions, the same on
/// the host (which counts tiles) and on the device (which finds its place).
///
/// A run is what one team of threads handles: the columns of one group in one row or, where rows
/// share scales, a segment of a row. Team members take quads of four neighbouring columns
/// in turn, so that one Philox block serves a quad. Which threads make up a team follows the
/// storage, so that neighbouring threads touch neighbouring addresses:
///
///   kWarp   a short run along contiguous columns: 8 runs a block
///   kBlock  a long run: the whole block
///   kLane   contiguous rows elsewhere (Conv1D): lane l of each of the 8 warps works for row l of
///   32
namespace moq::kernels::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarpSize * kWarps;
constexpr int kQuad = 4;
constexpr std::int64_t kLongRun = 2048;  ///< columns from which a run gets a whole block
constexpr std::int64_t kSegment = 4096;  ///< columns of a run where rows share scales

enum class Team : std::uint8_t { kWarp, kBlock, kLane };

struct Tiling {
  Team team;
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
  if (matrix.row_stride == 1 && matrix.col_stride != 1) {
    tiling.team = Team::kLane;
    tiling.tiles = divide_up(matrix.rows, kWarpSize) * tiling.runs_per_row;
  } else if (tiling.run_size < kLongRun) {
    tiling.team = Team::kWarp;
    tiling.tiles = divide_up(runs, kWarps);
  } else {
    tiling.team = Team::kBlock;
    tiling.tiles = runs;
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
    const bool whole_block = tiling.team == Team::kBlock;
    const std::int64_t run = whole_block ? tile : tile * kWarps + warp;
    place.row = run / tiling.runs_per_row;
    place.run = run % tiling.runs_per_row;
    place.member = whole_block ? thread : lane;
    place.members = whole_block ? kThreads : kWarpSize;
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
