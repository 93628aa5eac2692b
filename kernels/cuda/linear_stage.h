#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_norm.h"
#include "kernels/cuda/ptx.h"

/// The columns of the input that a thread block multiplies, in shared memory, normalised if need
/// be. Device code only.
///
/// Here every instruction lengthens the chain of a model's kernels: what does not depend on the
/// input is computed in front of the wait for the kernels ahead, and the statistics of a row take
/// one pass and one exchange between the warps.
namespace moq::kernels::cuda {

/// What is done with the columns on their way.
enum class StageKind : std::uint8_t {
  kCopied,
  kNormalised,
  kKept,  ///< normalised; of one token, of which a thread keeps a chunk in registers until then
};

/// kKind: what becomes of the columns; kSingle: they are one token's.
template <bool kBFloat16, int kWarps, StageKind kKind, bool kSingle>
class InputStage {
 public:
  using Element = typename ElementOf<kBFloat16>::Type;
  static constexpr int kThreads = kWarps * 32;
  static constexpr bool kNormalises = kKind != StageKind::kCopied;

  /// Columns [first, first + cols), whole chunks, zeros from the k-th on. In shared memory tokens
  /// are `stride` elements apart.
  __device__ InputStage(const DeviceLinearArgs& args, int k, int first, int cols, Element* staged,
                        int stride)
      : args_(args),
        k_(k),
        first_(first),
        chunks_(cols / kChunk),
        token_bytes_(stride * static_cast<int>(sizeof(Element))),
        whole_((kSingle ? k : k | args.input_stride) % kChunk == 0 && is_aligned(args.input)) {
    const int col = first + thread() * kChunk;
    bytes_ = col < k ? 16 : 0;
    source_ = static_cast<const Element*>(args.input) + (col < k ? col : 0);
    staged_ = shared_address(staged) + thread() * static_cast<int>(sizeof(Chunk));
    compute_now(bytes_);
    compute_now(source_);
    compute_now(staged_);
  }

  /// Begins to copy the columns as they are, to registers or to shared memory: a thread copies
  /// chunks thread, thread + threads, … of all tokens.
  __device__ void copy() {
    if constexpr (kKeeps) {
      kept_ = bytes_ > 0 ? load_global_quad(source_) : uint4{0, 0, 0, 0};
    }
    if (kNormalises && args_.norm.kind == NormKind::kLayerNorm) {
      load_samples();  // (behind a chunk that is kept, which more waits for)
    }
    if constexpr (!kKeeps) {
      whole_ ? copy_chunks() : copy_elements();
      close_async_group();
    }
  }

  /// What a thread needs for its first chunk, and what the statistics need of the shape.
  __device__ void load_norm() {
    load_norm(thread());
    for (int chunk = thread() + kThreads; !kKeeps && chunk < chunks_; chunk += kThreads) {
      prefetch(args_.norm.weight, chunk);
      prefetch(args_.norm.bias, chunk);
    }
    inverse_k_ = 1.0F / static_cast<float>(k_);
    compute_now(inverse_k_);
  }

  /// Normalises what copy() has brought, and rounds it. All threads of the block (of the cluster,
  /// if it has several) call this when their own copies are there.
  ///
  /// A row's statistics are those of differences from a pivot, the middle one of three of its
  /// numbers: neither a large mean nor an outlier drowns the variance. (Where two of the three are
  /// outliers, it is off by up to k / 2 units in the last place of float32.) An RMS norm's are
  /// about 0.
  __device__ void normalise(int split, NormShared<kWarps>& shared) {
    const bool centres = args_.norm.kind == NormKind::kLayerNorm;
    if constexpr (kKeeps) {
      normalise_kept(centres, shared);
    } else {
      normalise_staged(centres, split, shared);
    }
  }

 private:
  static constexpr bool kKeeps = kKind == StageKind::kKept;
  static constexpr int kSamples = 3;  // of a row
  static_assert(kNormTokens * kSamples <= 32);

  struct alignas(16) Chunk {
    Element element[kChunk];
  };

  __device__ void normalise_staged(bool centres, int split, NormShared<kWarps>& shared) {
    const int m = num_tokens();
    const float own_pivot = centres ? pivot_of_row() : 0.0F;
#pragma unroll 1
    for (int token = 0; token < m; ++token) {
      const float pivot = __shfl_sync(0xffffffffU, own_pivot, token);
      Differences own{0.0F, 0.0F};
      std::uint32_t place = staged_ + token * token_bytes_;
      for (int chunk = thread(); chunk < chunks_; chunk += kThreads) {
        float x[kChunk];
        differences_of(load_chunk(place), pivot, k_ - first_ - chunk * kChunk, x);
        add_differences(x, own);
        place += kThreads * static_cast<int>(sizeof(Chunk));
      }
      tell(token, warp_sums(centres, own), shared);
    }
    __syncthreads();
    const NormLine own = line_of(args_.norm, m, split, inverse_k_, shared);
    for (int first = thread() - lane(); first < chunks_; first += kThreads) {
      const int chunk = first + lane();
      if (first >= kThreads && chunk < chunks_) {
        load_norm(chunk);  // (the first one's has been)
      }
      std::uint32_t place = staged_ + (chunk - thread()) * static_cast<int>(sizeof(Chunk));
#pragma unroll 1
      for (int token = 0; token < m; ++token) {
        const NormLine line{__shfl_sync(0xffffffffU, own.start, token),
                            __shfl_sync(0xffffffffU, own.inverse, token)};
        const float pivot = __shfl_sync(0xffffffffU, own_pivot, token);
        if (chunk < chunks_) {
          float x[kChunk];
          differences_of(load_chunk(place), pivot, k_ - first_ - chunk * kChunk, x);
          store_normalised(line, x, place);
        }
        place += token_bytes_;
      }
    }
  }

  __device__ static int thread() {
    return static_cast<int>(threadIdx.x);
  }
  __device__ static int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }
  __device__ int num_tokens() const {
    return kSingle ? 1 : static_cast<int>(args_.m);
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

  __device__ void copy_chunks() const {
    if (thread() < chunks_) [[likely]] {
      copy_chunk(staged_, source_, bytes_);
    }
    for (int chunk = thread() + kThreads; chunk < chunks_; chunk += kThreads) {
      const int ahead = chunk - thread();
      const bool exists = first_ + chunk * kChunk < k_;
      copy_chunk(staged_ + ahead * static_cast<int>(sizeof(Chunk)),
                 exists ? source_ + ahead * kChunk : source_, exists ? 16 : 0);
    }
  }

  /// A chunk of every token.
  __device__ void copy_chunk(std::uint32_t target, const Element* source, int bytes) const {
#pragma unroll 1
    for (int token = 0; token < num_tokens(); ++token) {
      copy_bytes_async(target, source, bytes);
      target += token_bytes_;
      source += args_.input_stride;
    }
  }

  /// Element by element, of rows that do not consist of aligned chunks.
  __device__ void copy_elements() const {
    const auto* input = static_cast<const Element*>(args_.input);
    for (int chunk = thread(); chunk < chunks_; chunk += kThreads) {
      for (int token = 0; token < num_tokens(); ++token) {
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

  /// normalise() of the one token whose columns copy() has kept.
  __device__ void normalise_kept(bool centres, NormShared<kWarps>& shared) {
    const float pivot = centres ? middle_of(samples_[0], samples_[1], samples_[2]) : 0.0F;
    Chunk chunk;
    memcpy(&chunk, &kept_, sizeof(Chunk));
    float x[kChunk];
    differences_of(chunk, pivot, bytes_, x);  // (all exist, or none)
    Differences own{0.0F, 0.0F};
    add_differences(x, own);
    tell(0, warp_sums(centres, own), shared);
    __syncthreads();
    const NormLine line = line_of(args_.norm, /*m=*/1, /*split=*/1, inverse_k_, shared);
    if (thread() < chunks_) {
      store_normalised(line, x, staged_);
    }
  }

  /// Three numbers of a row that is kept; else one of those of all rows, a lane each.
  __device__ void load_samples() {
    const auto* input = static_cast<const Element*>(args_.input);
    const auto column = [&](int sample) { return sample == 0 ? 0 : sample == 1 ? k_ / 2 : k_ - 1; };
    if constexpr (kKeeps) {
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        samples_[i] = number_of(input[column(i)]);
      }
    } else {
      const int token = lane() / kSamples;
      samples_[0] = number_of(input[(token < num_tokens() ? token : 0) * args_.input_stride +
                                    column(lane() % kSamples)]);
    }
  }
  /// Lane i gets the pivot of row i.
  __device__ float pivot_of_row() const {
    const int first = min(lane(), kNormTokens - 1) * kSamples;
    float samples[kSamples];
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      samples[i] = __shfl_sync(0xffffffffU, samples_[0], first + i);
    }
    return middle_of(samples[0], samples[1], samples[2]);
  }

  /// Differences from the pivot of the first `exist` numbers, zeros behind them.
  __device__ static void differences_of(const Chunk& chunk, float pivot, int exist,
                                        float (&x)[kChunk]) {
    if (exist >= kChunk) [[likely]] {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[i] = number_of(chunk.element[i]) - pivot;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[i] = i < exist ? number_of(chunk.element[i]) - pivot : 0.0F;
      }
    }
  }

  /// Tells the block what a row's columns of this warp sum up to.
  __device__ static void tell(int token, const Differences& sums, NormShared<kWarps>& shared) {
    if (lane() == 0) {
      shared.parts[token][thread() / 32] = sums;
    }
  }

  __device__ void store_normalised(const NormLine& line, const float (&x)[kChunk],
                                   std::uint32_t place) const {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      round_to_element(fmaf(fmaf(x[i], line.inverse, line.start), scale_[i], shift_[i]),
                       chunk.element[i]);
    }
    store_chunk(place, chunk);
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
  uint4 kept_;               ///< the thread's chunk
  float samples_[kSamples];  ///< of the kept row; else the first, the lane's: pivot_of_row
  // of this thread's first chunk
  int bytes_;  ///< 0: zeros
  const Element* source_;
  std::uint32_t staged_;
  float scale_[kChunk] = {};
  float shift_[kChunk] = {};
  float inverse_k_ = 0.0F;
};

}  // namespace moq::kernels::cuda
