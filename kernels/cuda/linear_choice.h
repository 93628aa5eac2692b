#pragma once

#include <cstdint>
#include <limits>

#include "kernels/cuda/linear_wgmma.h"

/// Which kernel multiplies how many tokens by how large a weight. Measured with INT8 weights that
/// no cache holds, in a CUDA graph: tile_linear on an H100 80GB HBM3 on 2026-11-25, wgmma_linear on
/// an H200 on 2026-11-26, of 16 tokens on 2026-11-28, its tiles of 192 rows or tokens and split
/// ones of 96 tokens on an H100 between the other kernels of an encoder.
namespace moq::kernels::cuda {

/// Tokens that stream_linear takes (compute capability 9.0). wgmma_linear takes more (sm_90a), more
/// than kWideTokens of an input of which several don't fit into a thread block, but not few tokens
/// times many weights (n * k), which stream_linear and tile_linear read faster. (Five to eight
/// tokens times up to 32 million weights would be faster by wgmma_linear, but of an input that
/// fits, a token gives the same bits alone and among them.)
constexpr std::int64_t kStreamTokens = 8;
constexpr std::int64_t kWideTokens = 4;  // fewer stream, which takes longer but overlaps better
constexpr std::int64_t kTileTokens = 32;
constexpr std::int64_t kTileWeights = 100'000'000;

/// Products of so many tokens at most bring the next weight to the L2 cache, if it has so many
/// bytes at most. (Between the kernels of BERT, 64 and 128 tokens gain 1 to 3 % with INT8 weights,
/// and lose nothing with FP16; with 1024 and more, what is read early pushes out as much as it
/// helps.)
constexpr std::int64_t kPrefetchTokens = 256;
constexpr std::int64_t kPrefetchBytes = 8 << 20;

/// Tiles of tile_linear, by their rows and tokens.
enum class TileSize : std::uint8_t { k64x32, k64x64, k128x32, k128x64, k128x128 };

struct TileChoice {
  std::int64_t most_tokens;   ///< of the input
  std::int64_t most_weights;  ///< n * k
  TileSize size;
  int blocks;  ///< of a multiprocessor; the columns are split until there are as many
};

constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();

/// The first that fits is taken. Small tiles make enough blocks without splitting the columns far,
/// even where two of them read the same weights, the second from the cache.
// clang-format off
constexpr TileChoice kTileChoices[] = {
    {32, 16'000'000, TileSize::k64x32, 2},
    {32, kAny, TileSize::k128x32, 1},
    {64, 16'000'000, TileSize::k64x64, 2},
    {64, 64'000'000, TileSize::k64x32, 2},
    {64, kAny, TileSize::k128x64, 3},
    {256, kAny, TileSize::k64x64, 2},
    {kAny, kAny, TileSize::k128x128, 2},
};
// clang-format on

/// What a tile of wgmma_linear costs, in microseconds.
struct WgmmaCost {
  WgmmaChoice choice;
  bool groups;  ///< of weights that have them
  int rows;
  int tokens;
  double blocks;        ///< of a multiprocessor; fewer where clusters find no place for more, or
                        ///< where more take longer than others behind them
  double tile;          ///< beside its steps, with a share of the launch
  double step_alone;    ///< 64 columns, where no multiprocessor has two blocks
  double step_crowded;  ///< and where some have as many as they can
  /// If not 0, the cost is that of one-byte weights with at least so many steps. Where a block has
  /// few, what its cluster exchanges weighs more, and the wider blocks leave the next kernel's no
  /// room to begin early.
  std::int64_t least_steps = 0;
};

/// Microseconds that a launch for the rest of a weight's rows takes beside its tiles.
constexpr double kSecondLaunch = 2.0;

/// The least sum over the tiles that a multiprocessor takes one after the other is taken. INT8
/// weights; those of 16 bits cost about the same, and so do products in bfloat16.
// clang-format off
constexpr WgmmaCost kWgmmaCosts[] = {
    {{WgmmaTile::k128x256, 1}, false, 128, 256, 1.0, 6.4, 0.56, 0.56},
    {{WgmmaTile::k128x192, 1}, false, 128, 192, 1.0, 4.85, 0.42, 0.42},
    {{WgmmaTile::k192x128, 1}, false, 192, 128, 1.0, 3.9, 0.486, 0.486},
    {{WgmmaTile::k128x128, 1}, false, 128, 128, 1.0, 5.0, 0.34, 0.34},
    {{WgmmaTile::k128x128, 2}, false, 128, 128, 1.0, 5.0, 0.34, 0.34},
    {{WgmmaTile::k128x128, 4}, false, 128, 128, 0.9, 5.2, 0.32, 0.32},
    {{WgmmaTile::k64x128, 1}, false, 64, 128, 2.0, 3.1, 0.30, 0.41},
    {{WgmmaTile::k64x96, 1}, false, 64, 96, 2.0, 3.1, 0.23, 0.32},
    {{WgmmaTile::k64x96, 2}, false, 64, 96, 2.0, 4.5, 0.24, 0.33, 32},
    {{WgmmaTile::k64x64, 1}, false, 64, 64, 2.0, 3.4, 0.21, 0.29},
    {{WgmmaTile::k64x64, 2}, false, 64, 64, 2.0, 3.2, 0.22, 0.30},
    {{WgmmaTile::k64x64, 4}, false, 64, 64, 1.8, 3.4, 0.25, 0.28},
    {{WgmmaTile::k64x64, 8}, false, 64, 64, 1.8, 3.4, 0.30, 0.30},
    {{WgmmaTile::k64x32, 1}, false, 64, 32, 3.0, 1.7, 0.24, 0.36},
    {{WgmmaTile::k64x32, 2}, false, 64, 32, 3.0, 3.1, 0.24, 0.33},
    {{WgmmaTile::k64x32, 4}, false, 64, 32, 2.4, 2.8, 0.33, 0.33},
    {{WgmmaTile::k64x16, 2}, false, 64, 16, 3.1, 1.8, 0.25, 0.42},
    {{WgmmaTile::k64x16, 3}, false, 64, 16, 3.1, 1.8, 0.27, 0.42},
    {{WgmmaTile::k64x16, 4}, false, 64, 16, 3.1, 1.8, 0.28, 0.42},
    {{WgmmaTile::k64x16, 5}, false, 64, 16, 3.1, 1.8, 0.30, 0.42},
    {{WgmmaTile::k64x16, 6}, false, 64, 16, 3.1, 1.8, 0.30, 0.42},
    {{WgmmaTile::k64x16, 8}, false, 64, 16, 3.1, 1.8, 0.30, 0.42},
    {{WgmmaTile::k128x192, 1}, true, 128, 160, 1.0, 4.5, 0.57, 0.57},
    {{WgmmaTile::k128x128, 1}, true, 128, 128, 1.0, 5.0, 0.45, 0.45},
    {{WgmmaTile::k128x128, 2}, true, 128, 128, 1.0, 5.0, 0.45, 0.45},
    {{WgmmaTile::k64x64, 1}, true, 64, 64, 2.0, 3.4, 0.25, 0.34},
    {{WgmmaTile::k64x64, 2}, true, 64, 64, 2.0, 3.2, 0.26, 0.35},
    {{WgmmaTile::k64x64, 4}, true, 64, 64, 1.8, 3.4, 0.30, 0.33},
    {{WgmmaTile::k64x64, 8}, true, 64, 64, 1.8, 3.4, 0.35, 0.35},
    {{WgmmaTile::k64x32, 1}, true, 64, 32, 3.0, 1.7, 0.28, 0.42},
    {{WgmmaTile::k64x32, 2}, true, 64, 32, 3.0, 3.1, 0.28, 0.39},
    {{WgmmaTile::k64x32, 4}, true, 64, 32, 2.4, 2.8, 0.39, 0.39},
    {{WgmmaTile::k64x16, 2}, true, 64, 16, 3.1, 1.8, 0.30, 0.47},
    {{WgmmaTile::k64x16, 3}, true, 64, 16, 3.1, 1.8, 0.32, 0.47},
    {{WgmmaTile::k64x16, 4}, true, 64, 16, 3.1, 1.8, 0.33, 0.47},
    {{WgmmaTile::k64x16, 5}, true, 64, 16, 3.1, 1.8, 0.35, 0.47},
    {{WgmmaTile::k64x16, 6}, true, 64, 16, 3.1, 1.8, 0.35, 0.47},
    {{WgmmaTile::k64x16, 8}, true, 64, 16, 3.1, 1.8, 0.35, 0.47},
};
// clang-format on

}  // namespace moq::kernels::cuda
