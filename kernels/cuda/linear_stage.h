#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_norm.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"

/// The columns of the input that a thread block multiplies, in shared memory, normalised if need
/// be. Device code only.
///
/// Here every instruction lengthens the chain of a model's kernels: what does not depend on the
/// input is computed in front of the wait for the kernels ahead, and the statistics of a row take
/// one pass and one exchange between the warps.
namespace moq::kernels::cuda {

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
        chunks_(cols / kChunk),
        token_bytes_(stride * static_cast<int>(sizeof(Element))),
        whole_((k | args.input_stride) % kChunk == 0 && is_aligned(args.input)) {
    const int col = first + thread() * kChunk;
    bytes_ = col < k ? 16 : 0;
    source_ = static_cast<const Element*>(args.input) + (col < k ? col : 0);
    staged_ = shared_address(staged) + thread() * static_cast<int>(sizeof(Chunk));
    compute_now(bytes_);
    compute_now(source_);
    compute_now(staged_);
  }

  /// Begins to copy the columns as they are: a thread copies chunks thread, thread + threads, … of
  /// all tokens.
  __device__ void copy() const {
    if (whole_) [[likely]] {
      if (thread() < chunks_) [[likely]] {
        copy_chunk(staged_, source_, bytes_);
      }
      for (int chunk = thread() + kThreads; chunk < chunks_; chunk += kThreads) {
        const int ahead = chunk - thread();
        const bool exists = first_ + chunk * kChunk < k_;
        copy_chunk(staged_ + ahead * static_cast<int>(sizeof(Chunk)),
                   exists ? source_ + ahead * kChunk : source_, exists ? 16 : 0);
      }
    } else {
      copy_elements();
    }
    close_async_group();
  }

  /// What a thread needs for its first chunk, and what the statistics need of the shape.
  __device__ void load_norm() {
    load_norm(thread());
    for (int chunk = thread() + kThreads; chunk < chunks_; chunk += kThreads) {
      prefetch(args_.norm.weight, chunk);
      prefetch(args_.norm.bias, chunk);
    }
    int cols = 0;  // of the warp
    for (int chunk = thread() - lane(); chunk < chunks_; chunk += kThreads) {
      cols += max(0, min(kWarpCols, min(chunks_ * kChunk, k_ - first_) - chunk * kChunk));
    }
    cols_ = static_cast<float>(cols);
    inverse_cols_ = cols > 0 ? 1.0F / cols_ : 0.0F;
    inverse_k_ = 1.0F / static_cast<float>(k_);
    compute_now(cols_);
    compute_now(inverse_cols_);
    compute_now(inverse_k_);
  }

  /// Normalises what copy() has brought, and rounds it. All threads of the block (of the cluster,
  /// if it has several) call this when their own copies are there. cols_of(rank): columns of a
  /// block.
  template <typename ColsOf>
  __device__ void normalise(int split, int rank, const ColsOf& cols_of,
                            NormShared<kWarps>& shared) {
    const int m = static_cast<int>(args_.m);
    const int warp = thread() / 32;
    const bool centres = args_.norm.kind == NormKind::kLayerNorm;
#pragma unroll 1
    for (int token = 0; token < m; ++token) {
      const float4 part = part_of(token, centres);
      if (lane() == 0) {
        shared.parts[token][warp] = part;
      }
    }
    __syncthreads();
    const NormStatistics own = merge_parts(args_.norm, m, split, rank, inverse_k_, cols_of, shared);
    for (int first = thread() - lane(); first < chunks_; first += kThreads) {
      const bool exists = first + lane() < chunks_;
      if (first >= kThreads && exists) {
        load_norm(first + lane());  // (the first one's has been)
      }
      std::uint32_t place =
          staged_ + (first - (thread() - lane())) * static_cast<int>(sizeof(Chunk));
#pragma unroll 1
      for (int token = 0; token < m; ++token) {
        const float mean = __shfl_sync(0xffffffffU, own.mean, token);
        const float inverse = __shfl_sync(0xffffffffU, own.inverse, token);
        if (exists) {
          Chunk chunk = load_chunk(place);
          float x[kChunk];
          numbers_of(chunk, x);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            round_to_element(fmaf((x[i] - mean) * inverse, scale_[i], shift_[i]), chunk.element[i]);
          }
          store_chunk(place, chunk);
        }
        place += token_bytes_;
      }
    }
  }

 private:
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpCols = 32 * kChunk;  // that a warp copies at once

  struct alignas(16) Chunk {
    Element element[kChunk];
  };

  __device__ static int thread() {
    return static_cast<int>(threadIdx.x);
  }
  __device__ static int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }
  __device__ static bool is_aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Chunk) == 0;
  }
  __device__ static Chunk load_chunk(std::uint32_t place) {
    const uint4 quad = load_shared_quad(place);
    Chunk chunk;
    memcpy(&chunk, &quad, sizeof(Chunk));
    return chunk;
  }
  __device__ static void store_chunk(std::uint32_t place, const Chunk& chunk) {
    uint4 quad;
    memcpy(&quad, &chunk, sizeof(Chunk));
    store_shared_quad(place, quad);
  }

  /// A chunk of every token.
  __device__ void copy_chunk(std::uint32_t target, const Element* source, int bytes) const {
    const int m = static_cast<int>(args_.m);
#pragma unroll 1
    for (int token = 0; token < m; ++token) {
      copy_bytes_async(target, source, bytes);
      target += token_bytes_;
      source += args_.input_stride;
    }
  }

  /// Element by element, of rows that do not consist of aligned chunks.
  __device__ void copy_elements() const {
    const auto* input = static_cast<const Element*>(args_.input);
    for (int chunk = thread(); chunk < chunks_; chunk += kThreads) {
      for (int token = 0; token < args_.m; ++token) {
        Chunk copy;
        for (int i = 0; i < kChunk; ++i) {
          const int col = first_ + chunk * kChunk + i;
          copy.element[i] = col < k_ ? input[token * args_.input_stride + col] : Element{0};
        }
        store_chunk(
            staged_ + (chunk - thread()) * static_cast<int>(sizeof(Chunk)) + token * token_bytes_,
            copy);
      }
    }
  }

  /// What NormShared tells of this warp's columns of a token.
  __device__ float4 part_of(int token, bool centres) const {
    float sum = 0.0F;
    float squares = 0.0F;
    float pivot = 0.0F;
    std::uint32_t place = staged_ + token * token_bytes_;
    for (int first = thread() - lane(); first < chunks_; first += kThreads) {
      const bool exists = first + lane() < chunks_;
      float x[kChunk] = {};
      if (exists) {
        numbers_of(load_chunk(place), x);
      }
      place += kThreads * static_cast<int>(sizeof(Chunk));
      if (centres) {
        if (first < kThreads) {
          pivot = middle_of(x[0], min(31, chunks_ - 1 - first));
        }
        subtract(exists ? pivot : 0.0F, first, x);
      }
      add_moments(x, sum, squares);
    }
    return warp_part(centres, pivot, sum, squares, cols_, inverse_cols_);
  }

  /// The middle one of three lanes' numbers, of lanes up to `last`: one number may be an outlier.
  __device__ static float middle_of(float own, int last) {
    const float a = __shfl_sync(0xffffffffU, own, 0);
    const float b = __shfl_sync(0xffffffffU, own, last / 2);
    const float c = __shfl_sync(0xffffffffU, own, last);
    return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
  }

  /// Takes the pivot from columns that exist; those behind the last are 0 and stay it.
  __device__ void subtract(float pivot, int first_chunk, float (&x)[kChunk]) const {
    const int first = first_ + first_chunk * kChunk;
    if (first + kWarpCols <= k_) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[i] -= pivot;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[i] -= first + lane() * kChunk + i < k_ ? pivot : 0.0F;
      }
    }
  }

  __device__ static void numbers_of(const Chunk& chunk, float (&x)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[i] = number_of(chunk.element[i]);
    }
  }

  /// Brings what load_norm(chunk) will read near.
  __device__ void prefetch(const float* from, int chunk) const {
    const int col = first_ + chunk * kChunk;
    if (from != nullptr && col < k_) {
      asm volatile("prefetch.global.L1 [%0];" ::"l"(from + col));
    }
  }
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
  int chunks_;
  int token_bytes_;  ///< in shared memory
  bool whole_;
  // of this thread's first chunk
  int bytes_;  ///< 0: zeros
  const Element* source_;
  std::uint32_t staged_;
  float scale_[kChunk] = {};
  float shift_[kChunk] = {};
  // of the warp's columns and the row's
  float cols_ = 0.0F;
  float inverse_cols_ = 0.0F;
  float inverse_k_ = 0.0F;
};

}  // namespace moq::kernels::cuda
