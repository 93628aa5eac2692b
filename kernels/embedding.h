#pragma once

#include <cstdint>
#include <span>

#include "kernels/common/dtype.h"

struct CUstream_st;

namespace moq::kernels {

/// A table of row vectors.
struct EmbeddingTable {
  const void* data;                           ///< [num_rows, hidden_size], row-major, dtype
  DType dtype = DType::kFloat32;              ///< float32, float16, bfloat16 or int8
  const float* scales = nullptr;              ///< [num_rows, hidden_size / group_size]; int8 only
  const std::int32_t* zero_points = nullptr;  ///< like scales; null: 0; int8 only
  std::int64_t group_size = 0;                ///< columns per scale, divides hidden_size; int8 only
  std::int64_t num_rows;
};

/// One table and the row that each token takes from it.
struct EmbeddingLookup {
  EmbeddingTable table;
  const std::int64_t* rows;  ///< [num_tokens], each in [0, num_rows)
};

/// Sum of one row from each table: token + position embeddings, or token + type + position ones.
///
///   output[t] = sum over lookups l, in the order given, of table_l[rows_l[t]]
///
/// An int8 element stands for scale * (code - zero_point). Converted and accumulated in float32.
struct EmbeddingArgs {
  std::span<const EmbeddingLookup> lookups;  ///< host memory, at least one
  float* output;                             ///< [num_tokens, hidden_size], row-major
  std::int64_t num_tokens;                   ///< >= 0
  std::int64_t hidden_size;                  ///< >= 1
};

namespace cpu {
/// @throws moq::Error for an unsupported dtype, int8 without scales, a group_size that does not
///         divide hidden_size, or a row outside [0, num_rows); nothing has been written then.
void embedding(const EmbeddingArgs& args);
}  // namespace cpu

/// A table of row vectors on a GPU, and the row that each token takes from it.
struct DeviceEmbeddingLookup {
  const void* data = nullptr;          ///< [num_rows, hidden_size], row-major
  DType dtype = DType::kFloat16;       ///< float32, float16 or bfloat16
  const std::int32_t* rows = nullptr;  ///< [num_tokens]
  /// Added to each of `rows`. The sum must be below num_rows, which is not checked; a negative one,
  /// as DeviceSamplingArgs::kNoToken gives, takes row 0.
  std::int32_t row_offset = 0;
};

/// The sum of `embedding` on a GPU: float32 sums, rounded to dtype once.
struct DeviceEmbeddingArgs {
  static constexpr int kMaxLookups = 3;
  DeviceEmbeddingLookup lookups[kMaxLookups] = {};
  std::int32_t num_lookups = 0;   ///< in [1, kMaxLookups]
  void* output = nullptr;         ///< [num_tokens, hidden_size], row-major, dtype
  std::int64_t num_tokens = 0;    ///< >= 0
  std::int64_t hidden_size = 0;   ///< >= 1
  DType dtype = DType::kFloat16;  ///< float16, bfloat16 or float32
};

namespace cuda {
/// The kernel behind it begins only when those ahead have ended, and may read what they wrote
/// without a wait of its own. (Not where num_tokens is 0: then nothing is launched.)
/// @throws moq::Error if a size, a dtype or the number of lookups is out of range, or the launch
///         fails.
void embedding(const DeviceEmbeddingArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
