#pragma once

#include <cstdint>
#include <limits>

/// Which kernel multiplies how many tokens by how large a weight. Measured with INT8 weights that
/// no cache holds, in a CUDA graph, on an H100 80GB HBM3 on 2026-11-25.
namespace moq::kernels::cuda {

/// Tokens that stream_linear takes (compute capability 9.0); tile_linear takes what is left.
constexpr std::int64_t kStreamTokens = 8;

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

}  // namespace moq::kernels::cuda
