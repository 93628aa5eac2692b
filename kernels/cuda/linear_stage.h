#pragma once

#include <cstdint>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_norm.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"

/// The columns of the input that a thread block multiplies, in shared memory, normalised if need
/// be. Device code only.
namespace moq::kernels::cuda {

/// What the blocks of a cluster know of the rows that they normalise.
struct NormShared {
  alignas(8) Moments moments[kNormTokens];  ///< of the block's columns
  NormStatistics statistics[kNormTokens];
};

template <bool kBFloat16, int kWarps>
class InputStage {
 public:
  using Element = typename ElementOf<kBFloat16>::Type;

  /// Columns [first, first + cols), whole chunks, zeros from the k-th on. In shared memory tokens
  /// are `stride` elements apart.
  __device__ InputStage(const DeviceLinearArgs& args, int k, int first, int cols, Element* staged,
                        int stride)
      : args_(args),
        k_(k),
        first_(first),
        cols_(cols),
        staged_(staged),
        stride_(stride),
        whole_((k | args.input_stride) % kChunk == 0 && is_aligned(args.input)) {
    const int m = static_cast<int>(args.m);
    int parts = 1;  // of a token, each copied by a warp; the statistics are those of one warp
    while (args.norm.kind == NormKind::kNone && parts * 2 * m <= kWarps) {
      parts *= 2;
    }
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int chunks = cols / kChunk;
    token_ = warp / parts;
    token_step_ = kWarps / parts;
    const int part = warp - token_ * parts;
    begin_ = chunks * part / parts + lane;
    end_ = chunks * (part + 1) / parts;
    const int col = first + begin_ * kChunk;
    const bool has_first = token_ < m && begin_ < end_;
    first_chunk_ = whole_ && has_first ? begin_ : -1;
    has_more_ = has_first && (!whole_ || begin_ + 32 < end_ || token_ + token_step_ < m) ? 1 : 0;
    bytes_ = col < k ? 16 : 0;
    source_ = has_first && col < k ? row(token_) + col : row(0);
    target_ = shared_address(staged + token_ * stride + begin_ * kChunk);
    compute_now(first_chunk_);
    compute_now(has_more_);
    compute_now(bytes_);
    compute_now(source_);
    compute_now(target_);
  }

  /// Begins to copy the columns as they are.
  __device__ void copy() const {
    if (first_chunk_ >= 0) {
      copy_bytes_async(target_, source_, bytes_);
    }
    if (has_more_) {
      copy_more();
    }
    close_async_group();
  }

  /// Scale and shift of this thread's first chunk.
  __device__ void load_norm() { load_norm(static_cast<int>(threadIdx.x)); }

  /// Normalises what copy() has brought, and rounds it. All threads of the block (of the cluster,
  /// if it has several) call this when their own copies are there. cols_of(rank): columns of a
  /// block.
  template <typename ColsOf>
  __device__ void normalise(int split, const ColsOf& cols_of, NormShared& shared) {
    const int m = static_cast<int>(args_.m);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (warp < m) {
      const Moments own = warp_moments(args_.norm.kind, max(0, min(cols_, k_ - first_)), lane,
                                       [&](int col, float(&x)[kChunk]) {
                                         const Chunk chunk = *chunk_at(warp, col / kChunk);
#pragma unroll
                                         for (int i = 0; i < kChunk; ++i) {
                                           x[i] = number_of(chunk.element[i]);
                                         }
                                       });
      if (lane == 0) {
        shared.moments[warp] = own;
        shared.statistics[warp] = statistics_of(args_.norm, own, k_);
      }
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (split > 1) {
      merge_moments(split, cols_of, warp, lane, shared);
    }
#endif
    __syncthreads();
    const int chunks = cols_ / kChunk;
    for (int chunk = static_cast<int>(threadIdx.x); chunk < chunks; chunk += kWarps * 32) {
      if (chunk >= kWarps * 32) {
        load_norm(chunk);  // (the first one's has been)
      }
#pragma unroll 2
      for (int token = 0; token < m; ++token) {
        const NormStatistics statistics = shared.statistics[token];
        Chunk* place = chunk_at(token, chunk);
        Chunk x = *place;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float centred = (number_of(x.element[i]) - statistics.mean) * statistics.inverse;
          round_to_element(fmaf(centred, scale_[i], shift_[i]), x.element[i]);
        }
        *place = x;
      }
    }
  }

 private:
  struct alignas(16) Chunk {
    Element element[kChunk];
  };

  __device__ static bool is_aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Chunk) == 0;
  }
  __device__ const Element* row(int token) const {
    return static_cast<const Element*>(args_.input) + token * args_.input_stride;
  }
  __device__ Chunk* chunk_at(int token, int chunk) const {
    return reinterpret_cast<Chunk*>(staged_ + token * stride_) + chunk;
  }

  /// All but the thread's first chunk, or every element of rows that do not consist of aligned
  /// chunks.
  __device__ void copy_more() const {
    for (int token = token_; token < args_.m; token += token_step_) {
      for (int chunk = begin_; chunk < end_; chunk += 32) {
        const int col = first_ + chunk * kChunk;
        Element* target = staged_ + token * stride_ + chunk * kChunk;
        if (!whole_) {
          for (int i = 0; i < kChunk; ++i) {
            target[i] = col + i < k_ ? row(token)[col + i] : Element{0};
          }
        } else if (token > token_ || chunk > begin_) {
          copy_async(shared_address(target), row(col < k_ ? token : 0) + (col < k_ ? col : 0),
                     col < k_);
        }
      }
    }
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  /// Statistics of whole rows from those of the columns of each block.
  template <typename ColsOf>
  __device__ void merge_moments(int split, const ColsOf& cols_of, int warp, int lane,
                                NormShared& shared) const {
    synchronize_cluster();
    if (warp < args_.m) {
      Moments theirs{0.0F, 0.0F};
      float count = 0.0F;
      if (lane < split) {
        const float2 pair =
            load_from_cluster(reinterpret_cast<const float2*>(&shared.moments[warp]), lane);
        theirs = {pair.x, pair.y};
        count = static_cast<float>(cols_of(lane));
      }
      const float mean = warp_sum(count * theirs.mean) / static_cast<float>(k_);
      const float difference = theirs.mean - mean;
      const float squares = warp_sum(theirs.squares + count * (difference * difference));
      if (lane == 0) {
        shared.statistics[warp] = statistics_of(args_.norm, {mean, squares}, k_);
      }
    }
  }
#endif

  __device__ void load_norm(int chunk) {
    load_floats(args_.norm.weight, chunk, scale_);
    load_floats(args_.norm.bias, chunk, shift_);
  }
  /// Zeros where there are none.
  __device__ void load_floats(const float* from, int chunk, float (&values)[kChunk]) const {
    const int col = first_ + chunk * kChunk;
    if (from != nullptr && col + kChunk <= k_ && is_aligned(from)) {
#pragma unroll
      for (int i = 0; i < kChunk; i += 4) {
        const float4 quad = *reinterpret_cast<const float4*>(from + col + i);
        values[i] = quad.x;
        values[i + 1] = quad.y;
        values[i + 2] = quad.z;
        values[i + 3] = quad.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        values[i] = from != nullptr && col + i < k_ ? from[col + i] : 0.0F;
      }
    }
  }

  const DeviceLinearArgs& args_;
  int k_;
  int first_;
  int cols_;
  Element* staged_;
  int stride_;
  bool whole_;
  // what this thread copies: chunks begin_, begin_ + 32, … of tokens token_, token_ + token_step_,
  // …
  int token_;
  int token_step_;
  int begin_;
  int end_;
  // the first of them, if there is one and it is aligned
  int first_chunk_;  ///< else < 0
  int bytes_;        ///< 0: zeros
  const Element* source_;
  std::uint32_t target_;
  int has_more_;
  float scale_[kChunk] = {};
  float shift_[kChunk] = {};
};

}  // namespace moq::kernels::cuda
