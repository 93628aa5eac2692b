#pragma once

#include "kernels/cuda/linear_choice.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/linear_wgmma.h"

/// What linear.cu chooses from.
namespace moq::kernels::cuda {

/// Whether tensor cores multiply the weight as it is stored: 16-bit input, and a weight of integers
/// with scales for whole blocks of columns, or of the input's own dtype.
bool suits_tensor_cores(const DeviceLinearArgs& args, const DeviceLayout& layout);

/// Whether stream_linear multiplies these, up to kStreamTokens tokens, on the current device.
bool can_stream(const DeviceLinearArgs& args, const DeviceLayout& layout);
/// Whether it does so in clusters of thread blocks, because the input is too wide for one.
bool streams_in_clusters(const DeviceLinearArgs& args, const DeviceLayout& layout);
void stream_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, CUstream_st* stream);

/// Whether tile_linear multiplies these, any number of tokens, on the current device.
bool can_tile(const DeviceLinearArgs& args, const DeviceLayout& layout);
TileChoice choose_tile(const DeviceLinearArgs& args, const DeviceLayout& layout);
/// `choice` tells the tile and how far its columns are split; which inputs it is meant for does not
/// matter.
void tile_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, const TileChoice& choice,
                 CUstream_st* stream);

}  // namespace moq::kernels::cuda
