#pragma once

#include "kernels/attention.h"
#include "kernels/linear.h"

struct CUstream_st;

namespace moq::kernels::cuda {

/// Whether qkv_attention computes these, on the current device, in less time than `linear` and
/// `attention` one after the other: the longest sequence has 9 to 128 tokens, heads of 64
/// dimensions have keys of their own, nothing stands between projection and attention (rotations,
/// norms of heads, a cache), the weight is one of integers with one scale a row or of the
/// activations' 16-bit dtype, compute capability is 9.0, and all heads of all sequences run at
/// once.
bool prefers_qkv_attention(const DeviceLinearArgs& projection,
                           const DeviceAttentionArgs& attention);

/// Whether the sums of q, k and v are those of the first half of the columns' steps of 64 plus
/// those of the second, as `linear` has them where it splits a weight's columns in two.
bool qkv_attention_halves(const DeviceLinearArgs& projection, const DeviceAttentionArgs& attention);

/// attention(q, k, v) with [q | k | v] = input · weightᵀ + bias, in one launch: q, k and v exist in
/// shared memory only, rounded to dtype as `linear` rounds them. `projection.output` and the query
/// and packed rows of `attention` mean nothing.
///
/// Products are exact, sums and softmax float32, as in `linear` and `attention`. The order of a sum
/// depends on what qkv_attention_halves says, not on the token's place.
/// @throws moq::Error for inconsistent sizes, a missing pointer, what the kernel does not compute
///         at all (speed apart), or a launch that fails.
void qkv_attention(const DeviceLinearArgs& projection, const DeviceAttentionArgs& attention,
                   CUstream_st* stream);

}  // namespace moq::kernels::cuda
