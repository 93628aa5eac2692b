#pragma once

#include "kernels/cuda/linear_layout.h"

/// What linear.cu chooses from.
namespace moq::kernels::cuda {

/// Streams the weight for up to kStreamTokens rows of float16 or bfloat16 input.
constexpr std::int64_t kStreamTokens = 8;

/// Whether stream_linear multiplies these on the current device.
bool can_stream(const DeviceLinearArgs& args, const DeviceLayout& layout);
void stream_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, CUstream_st* stream);

}  // namespace moq::kernels::cuda
