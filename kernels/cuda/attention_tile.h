#pragma once

#include <bit>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/ptx.h"

/// What the tensor-core kernels of attention work on: rows of queries, and tiles of keys and values
/// that are copied to shared memory in the background. Device code only.
///
/// Rows are (token, head) pairs: row r of a kv head is token r / group and head r % group, so that
/// the query heads of a kv head read its keys once.
namespace moq::kernels::cuda {

/// i / divisor from the inverse of the divisor, exact as long as i is below 2^20.
__device__ inline int divide(int i, float inverse) {
  return static_cast<int>((static_cast<float>(i) + 0.5F) * inverse);
}

/// Rows from one on, as tokens and heads. Its division is done where time does not matter: before
/// the kernels ahead have ended.
class RowMap {
 public:
  struct Place {
    int token;  ///< of the sequence's new tokens
    int head;   ///< of the group
  };

  __device__ RowMap(int first, int group)
      : token_(first / group),
        head_(first % group),
        group_(group),
        inverse_(1.0F / static_cast<float>(group)) {}
  /// Row first + i; exact as long as i + group is below 2^20.
  __device__ Place at(int i) const {
    const int row = head_ + i;
    const int tokens = divide(row, inverse_);
    return {token_ + tokens, row - tokens * group_};
  }

 private:
  int token_;
  int head_;
  int group_;
  float inverse_;
};

/// Keys or values in shared memory: 16 unused bytes behind each row spread the rows over the banks.
template <bool kInt8, int kDim>
struct TileLayout {
  static constexpr int kRowBytes = kDim * (kInt8 ? 1 : 2) + 16;
  /// Of a tile of keys, their values and, of codes, the step sizes of both.
  static constexpr int stage_bytes(int keys) {
    return keys * (2 * kRowBytes + (kInt8 ? 2 * static_cast<int>(sizeof(float)) : 0));
  }
};

/// A sequence as seen by a kv head.
struct KeySource {
  const char* keys;
  const char* values;
  const float* key_scales;  ///< of codes
  const float* value_scales;
  std::int64_t row_bytes;  ///< from key to key
};

/// Keys from `first` on; `page` is that of `first`, where there are pages.
template <bool kInt8>
__device__ KeySource keys_from(const DeviceAttentionArgs& args, const DeviceSequence& sequence,
                               int kv_head, std::int32_t page, int first) {
  constexpr int kBytes = kInt8 ? 1 : 2;
  if (kInt8 || args.pages.keys != nullptr) {
    const std::int64_t row =
        (page * args.num_kv_heads + kv_head) * kPageTokens + first % static_cast<int>(kPageTokens);
    const std::int64_t offset = row * args.head_dim * kBytes;
    return {static_cast<const char*>(args.pages.keys) + offset,
            static_cast<const char*>(args.pages.values) + offset,
            kInt8 ? args.pages.key_scales + row : nullptr,
            kInt8 ? args.pages.value_scales + row : nullptr, args.head_dim * kBytes};
  }
  const std::int64_t offset =
      ((sequence.token_begin + static_cast<std::int64_t>(first)) * args.packed_stride +
       kv_head * args.head_dim) *
      kBytes;
  return {static_cast<const char*>(args.packed_keys) + offset,
          static_cast<const char*>(args.packed_values) + offset, nullptr, nullptr,
          args.packed_stride * kBytes};
}

/// The page of key `first` of a sequence, where there are pages.
__device__ inline std::int32_t page_of(const DeviceAttentionArgs& args,
                                       const DeviceSequence& sequence, int first) {
  return args.pages.keys == nullptr ? 0
                                    : args.page_table[sequence.slot * args.page_table_stride +
                                                      first / static_cast<int>(kPageTokens)];
}

/// How kThreads threads share the pieces of 16 bytes of rows, kChunks in each: a thread has the
/// same piece of every kStep-th row.
template <int kChunks, int kThreads>
struct PiecesOf {
  static constexpr int kPadded = static_cast<int>(std::bit_ceil(static_cast<unsigned>(kChunks)));
  static constexpr int kStep = kThreads / kPadded;
  __device__ static int row(int thread) { return thread / kPadded; }
  __device__ static int chunk(int thread) { return thread % kPadded; }  ///< may be kChunks or more
};

/// visit(row, piece) for the pieces of 16 bytes of kCount rows, kChunks in each, that kThreads
/// threads share.
template <int kCount, int kChunks, int kThreads, typename Visitor>
__device__ void each_piece(int thread, const Visitor& visit) {
  using Pieces = PiecesOf<kChunks, kThreads>;
  const int row = Pieces::row(thread);
  const int chunk = Pieces::chunk(thread);
  if (chunk < kChunks && (kCount >= Pieces::kStep || row < kCount)) {
#pragma unroll
    for (int i = 0; i < kCount; i += Pieces::kStep) {
      visit(i + row, chunk);
    }
  }
}

/// Copies kRows rows, of which `existing` exist and `row_chunks` pieces of 16 bytes of each; zeros
/// stand for the rest. kThreads threads share the work.
///
/// @tparam kLong  worth the instructions of a copy of its own where all rows exist
template <bool kLong, int kRows, int kChunks, int kThreads>
__device__ void copy_rows(std::uint32_t target, int target_bytes, const char* source,
                          std::int64_t source_bytes, int existing, int row_chunks, int thread) {
  using Pieces = PiecesOf<kChunks, kThreads>;
  static_assert(kRows % Pieces::kStep == 0);
  const int row = Pieces::row(thread);
  const int chunk = Pieces::chunk(thread);
  if (chunk >= kChunks) {
    return;
  }
  const bool inside = chunk < row_chunks;
  const char* piece = source + row * source_bytes + chunk * 16;
  target += row * target_bytes + chunk * 16;
  if (kLong && existing >= kRows) {
#pragma unroll
    for (int i = 0; i < kRows; i += Pieces::kStep) {
      copy_async(target + i * target_bytes, piece, inside);
      piece += Pieces::kStep * source_bytes;
    }
    return;
  }
#pragma unroll(kLong ? 2 : kRows)
  for (int i = 0; i < kRows; i += Pieces::kStep) {
    const bool exists = inside && row + i < existing;
    copy_async(target + i * target_bytes, exists ? piece : source, exists);
    piece += Pieces::kStep * source_bytes;
  }
}

/// Copies kKeys keys (kind 0), of which `existing` exist, or their values (kind 1) into a stage, in
/// the background; with the keys come the step sizes of both.
template <bool kInt8, int kDim, int kKeys, int kThreads>
__device__ void copy_keys(std::uint32_t stage, const KeySource& source, int kind, int existing,
                          int head_dim, int thread) {
  using Layout = TileLayout<kInt8, kDim>;
  constexpr int kBytes = kInt8 ? 1 : 2;
  constexpr int kWarpSize = 32;
  copy_rows<(kThreads > kWarpSize), kKeys, kDim * kBytes / 16, kThreads>(
      stage + kind * kKeys * Layout::kRowBytes, Layout::kRowBytes,
      kind == 0 ? source.keys : source.values, source.row_bytes, existing, head_dim * kBytes / 16,
      thread);
  if (kInt8 && kind == 0) {
    const std::uint32_t scales = stage + 2 * kKeys * Layout::kRowBytes;
#pragma unroll
    for (int i = 0; i < 2 * kKeys; i += kThreads) {
      const int item = thread + i;
      const int key = item % kKeys;
      const float* from = item < kKeys ? source.key_scales : source.value_scales;
      if (2 * kKeys % kThreads == 0 || item < 2 * kKeys) {
        copy_word_async(scales + item * 4, from + (key < existing ? key : 0), key < existing);
      }
    }
  }
}

}  // namespace moq::kernels::cuda
