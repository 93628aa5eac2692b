// Sums of rows of tables, memory-bound. A thread takes a few neighbouring columns of a token, up to
// 16 bytes of each table, and requests them from all tables before it adds them up.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"
#include "kernels/embedding.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxLookups = DeviceEmbeddingArgs::kMaxLookups;
constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max();

/// Columns of a table's row as they are stored, and as numbers.
template <int kWidth>
struct Stored {
  static constexpr bool kMayBeWide = kWidth * sizeof(float) <= kVectorBytes;
  union {
    Numbers<kMayBeWide ? kWidth : 1> wide;
    Vector<Float16, kWidth> narrow;  // or BFloat16, with the same bits
  };

  __device__ void load(const void* data, DType dtype, std::int64_t offset) {
    if constexpr (kMayBeWide) {
      if (dtype == DType::kFloat32) {
        wide = load_vector<kWidth>(static_cast<const float*>(data) + offset);
        return;
      }
    }
    narrow = load_vector<kWidth>(static_cast<const Float16*>(data) + offset);
  }
  __device__ Numbers<kWidth> numbers(DType dtype) const {
    if constexpr (kMayBeWide) {
      if (dtype == DType::kFloat32) {
        return wide;
      }
    }
    return dtype == DType::kFloat16 ? numbers_of(narrow)
                                    : numbers_of(std::bit_cast<Vector<BFloat16, kWidth>>(narrow));
  }
};

/// @tparam kWidth        columns of a thread
/// @param token_blocks   thread blocks of a token
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kMaxThreads)
    embedding_kernel(DeviceEmbeddingArgs args, unsigned token_blocks) {
  // In this order: kernels behind this one read what those ahead wrote, such as a step's sequences,
  // without a wait of their own.
  wait_for_previous_kernels();
  allow_next_kernel();
  const std::int64_t token = blockIdx.x / token_blocks;
  const std::int64_t col =
      (static_cast<std::int64_t>(blockIdx.x % token_blocks) * blockDim.x + threadIdx.x) * kWidth;
  if (col >= args.hidden_size) {
    return;
  }
  std::int64_t offset[kMaxLookups];
  Stored<kWidth> stored[kMaxLookups];
#pragma unroll
  for (int l = 0; l < kMaxLookups; ++l) {
    if (l < args.num_lookups) {
      const DeviceEmbeddingLookup& lookup = args.lookups[l];
      const std::int64_t row = std::int64_t{lookup.rows[token]} + lookup.row_offset;
      offset[l] = (row < 0 ? 0 : row) * args.hidden_size + col;
    }
  }
#pragma unroll
  for (int l = 0; l < kMaxLookups; ++l) {
    if (l < args.num_lookups) {
      stored[l].load(args.lookups[l].data, args.lookups[l].dtype, offset[l]);
    }
  }
  Numbers<kWidth> sum = stored[0].numbers(args.lookups[0].dtype);
#pragma unroll
  for (int l = 1; l < kMaxLookups; ++l) {
    if (l < args.num_lookups) {
      const Numbers<kWidth> numbers = stored[l].numbers(args.lookups[l].dtype);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum.unit[i] += numbers.unit[i];
      }
    }
  }
  store_vector(static_cast<Element*>(args.output) + token * args.hidden_size + col,
               rounded<Element>(sum));
}

template <typename Element, int kWidth>
void launch_columns(const DeviceEmbeddingArgs& args, cudaStream_t stream) {
  const std::int64_t vectors = args.hidden_size / kWidth;
  const std::int64_t threads = std::min<std::int64_t>(round_up(vectors, kWarpSize), kMaxThreads);
  const std::int64_t token_blocks = divide_up(vectors, threads);
  MOQ_CHECK(args.num_tokens <= kMaxBlocks / token_blocks, "embedding: num_tokens must be at most ",
            kMaxBlocks / token_blocks, " with a hidden_size of ", args.hidden_size, ", got ",
            args.num_tokens);
  launch(embedding_kernel<Element, kWidth>,
         dim3(static_cast<unsigned>(args.num_tokens * token_blocks)),
         dim3(static_cast<unsigned>(threads)), 0, stream, args,
         static_cast<unsigned>(token_blocks));
}

void check(const DeviceEmbeddingArgs& args) {
  MOQ_CHECK(is_float(args.dtype), "embedding: dtype must be float16, bfloat16 or float32, got ",
            name_of(args.dtype));
  MOQ_CHECK(args.num_tokens >= 0, "embedding: num_tokens must be >= 0, got ", args.num_tokens);
  MOQ_CHECK(args.hidden_size >= 1, "embedding: hidden_size must be >= 1, got ", args.hidden_size);
  MOQ_CHECK(args.num_lookups >= 1 && args.num_lookups <= kMaxLookups,
            "embedding: num_lookups must be in [1, ", kMaxLookups, "], got ", args.num_lookups);
  MOQ_CHECK(args.num_tokens == 0 || args.output != nullptr, "embedding: output must not be null");
  for (int l = 0; l < args.num_lookups; ++l) {
    const DeviceEmbeddingLookup& lookup = args.lookups[l];
    MOQ_CHECK(is_float(lookup.dtype),
              "embedding: a table must be float32, float16 or bfloat16, got ",
              name_of(lookup.dtype));
    MOQ_CHECK(args.num_tokens == 0 || (lookup.data != nullptr && lookup.rows != nullptr),
              "embedding: a table and its rows must not be null");
  }
}

}  // namespace

void embedding(const DeviceEmbeddingArgs& args, cudaStream_t stream) {
  check(args);
  if (args.num_tokens == 0) {
    return;
  }
  std::size_t widest = 2;  // bytes of a table's element
  bool vectors = suits_vectors(args.output);
  for (int l = 0; l < args.num_lookups; ++l) {
    widest = std::max(widest, size_of(args.lookups[l].dtype));
    vectors = vectors && suits_vectors(args.lookups[l].data) &&
              suits_vectors(args.hidden_size, size_of(args.lookups[l].dtype));
  }
  visit_float(args.dtype, [&]<typename Element>(Element) {
    !vectors      ? launch_columns<Element, 1>(args, stream)
    : widest == 2 ? launch_columns<Element, kVectorBytes / 2>(args, stream)
                  : launch_columns<Element, kVectorBytes / 4>(args, stream);
  });
}

}  // namespace moq::kernels::cuda
