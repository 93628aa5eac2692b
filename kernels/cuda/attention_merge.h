#pragma once

#include <cstdint>
#include <limits>

#include "kernels/common/half.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/ptx.h"

/// How the parts of an attention output are put together that warps, and blocks of a cluster, have
/// computed for different keys. A part is a reference, the sum of the probabilities, which are
/// 2^(score - reference), and the products with the values. All orders are fixed. Device code only.
namespace moq::kernels::cuda {

constexpr int kMergeWarps = 4;  // of a block
constexpr int kMaxSplit = 16;   // blocks of a cluster
constexpr int kQuad = 4;        // dimensions that a thread merges at once
/// The reference of sums of nothing: whatever they are merged with has a larger one.
constexpr float kNoKeys = -std::numeric_limits<float>::max();

template <typename Element>
__device__ void store_quad(Element* target, const float4& value, float factor) {
  struct alignas(kQuad * sizeof(Element)) Quad {
    Element element[kQuad];
  };
  Quad quad;
  store_float(&quad.element[0], value.x * factor);
  store_float(&quad.element[1], value.y * factor);
  store_float(&quad.element[2], value.z * factor);
  store_float(&quad.element[3], value.w * factor);
  *reinterpret_cast<Quad*>(target) = quad;
}

__device__ inline void add_scaled(float4& sum, const float4& value, float factor) {
  sum.x = fmaf(value.x, factor, sum.x);
  sum.y = fmaf(value.y, factor, sum.y);
  sum.z = fmaf(value.z, factor, sum.z);
  sum.w = fmaf(value.w, factor, sum.w);
}

/// What the warps of a block have computed, in shared memory.
struct WarpParts {
  const float4* references;  ///< [rows], of the four warps
  const float4* sums;        ///< the same
  const std::uint8_t* products;
  int warp_bytes;  ///< from the products of a warp to those of the next
  int row_floats;  ///< from row to row

  /// Reference and sum of a row, and what each warp's products are multiplied by.
  __device__ float2 row(int row, float (&factors)[kMergeWarps]) const {
    const float4 r = references[row];
    const float4 s = sums[row];
    const float top = fmaxf(fmaxf(r.x, r.y), fmaxf(r.z, r.w));
    factors[0] = fast_exp2(r.x - top);
    factors[1] = fast_exp2(r.y - top);
    factors[2] = fast_exp2(r.z - top);
    factors[3] = fast_exp2(r.w - top);
    const float two = fmaf(s.y, factors[1], s.x * factors[0]);
    return {top, fmaf(s.w, factors[3], fmaf(s.z, factors[2], two))};
  }
  __device__ float4 quad(int row, int quad, const float (&factors)[kMergeWarps]) const {
    float4 sum{};
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) {
      const auto* own = reinterpret_cast<const float*>(products + w * warp_bytes);
      add_scaled(sum, *reinterpret_cast<const float4*>(own + row * row_floats + quad * kQuad),
                 factors[w]);
    }
    return sum;
  }
};

/// The rows of an output in quads.
struct QuadGrid {
  int rows;
  int quads;  ///< of a row
  float inverse_quads;

  __device__ int size() const { return rows * quads; }
  __device__ int row(int i) const { return divide(i, inverse_quads); }
};

/// Quads that an inbox needs room for: those that merge_cluster sends to a block.
constexpr int inbox_quads_of(int rows, int head_dim, int split) {
  return rows * (head_dim / kQuad) + split;
}

/// Where the parts of other blocks arrive.
struct Inbox {
  float4* products;
  float2* sums;  ///< (reference, sum) with each quad of the products
  std::uint32_t barrier;
};

/// store(row, quad, products, sum) of each quad, from a block that has all keys.
template <typename Store>
__device__ void merge_block(const WarpParts& parts, const QuadGrid& grid, const Store& store) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < grid.size(); i += static_cast<int>(blockDim.x)) {
    const int row = grid.row(i);
    const int quad = i - row * grid.quads;
    float factors[kMergeWarps];
    const float2 sum = parts.row(row, factors);
    store(row, quad, parts.quad(row, quad, factors), sum.y);
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// The same, from the blocks 0 to active - 1 of a cluster: block i % active finishes quad i.
template <typename Store>
__device__ void merge_cluster(const WarpParts& parts, const QuadGrid& grid, const Inbox& inbox,
                              int rank, int active, const Store& store) {
  constexpr int kWarpSize = 32;
  const int thread = static_cast<int>(threadIdx.x);
  const float inverse_active = __fdividef(1.0F, static_cast<float>(active));
  const int share = divide(grid.size() + active - 1, inverse_active);  // of a block, at most
  const int own_quads = divide(grid.size() - rank + active - 1, inverse_active);
  if (thread == 0 && own_quads > 0) {
    expect_bytes(inbox.barrier,
                 active * own_quads * static_cast<int>(sizeof(float4) + sizeof(float2)));
  }
#pragma unroll 1
  for (int i = thread; i < grid.size(); i += static_cast<int>(blockDim.x)) {
    const int row = grid.row(i);
    float factors[kMergeWarps];
    const float2 sum = parts.row(row, factors);
    const int turn = divide(i, inverse_active);
    const int place = rank * share + turn;
    const int owner = i - turn * active;
    send_to_cluster(shared_address(&inbox.products[place]),
                    parts.quad(row, i - row * grid.quads, factors), inbox.barrier, owner);
    send_to_cluster(shared_address(&inbox.sums[place]), sum, inbox.barrier, owner);
  }
  if (own_quads == 0) {
    return;  // nothing is sent to this block
  }
  wait_barrier(inbox.barrier, 0);
  // As many lanes as a cluster may have blocks share a quad.
  const int from = thread % kMaxSplit;
#pragma unroll 1
  for (int first = thread / kWarpSize * (kWarpSize / kMaxSplit); first < own_quads;
       first += static_cast<int>(blockDim.x) / kMaxSplit) {
    const int i = first + thread % kWarpSize / kMaxSplit;
    float2 part{kNoKeys, 0.0F};
    float4 products{};
    if (from < active && i < own_quads) {
      part = inbox.sums[from * share + i];
      products = inbox.products[from * share + i];
    }
    float top = part.x;
#pragma unroll
    for (int offset = kMaxSplit / 2; offset > 0; offset /= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, offset));
    }
    const float factor = fast_exp2(part.x - top);
    float sum = part.y * factor;
    products = {products.x * factor, products.y * factor, products.z * factor, products.w * factor};
#pragma unroll
    for (int offset = kMaxSplit / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffU, sum, offset);
      products.x += __shfl_xor_sync(0xffffffffU, products.x, offset);
      products.y += __shfl_xor_sync(0xffffffffU, products.y, offset);
      products.z += __shfl_xor_sync(0xffffffffU, products.z, offset);
      products.w += __shfl_xor_sync(0xffffffffU, products.w, offset);
    }
    if (from == 0 && i < own_quads) {
      const int item = i * active + rank;
      const int row = grid.row(item);
      store(row, item - row * grid.quads, products, sum);
    }
  }
}

#endif

}  // namespace moq::kernels::cuda
