#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/linear.h"

/// Weights in the order that kernels stream them, as byte tensors: one-dimensional for the CPU,
/// [lines, 64] for a GPU. The dimensions follow such a tensor wherever it is moved or saved, so
/// that a weight in the other order is known without a look at its bytes.
namespace moq::ops {

/// Whether a weight is packed for a GPU. Tracing shows a tensor without its device, on `meta`; its
/// dispatch keys still name the device that is meant.
bool packs_for_gpu(const at::Tensor& weight);

/// Sizes of the packed weight.
at::DimVector packed_sizes(const kernels::LinearShape& shape, bool for_gpu);

/// @throws TypeError or ValueError (Python's) naming `where`, unless `packed` is what pack_linear
///         returned for that shape on that device, or on any device if that is `meta`.
void check_packed(const char* where, const at::Tensor& packed, const kernels::LinearShape& shape,
                  at::Device device);

}  // namespace moq::ops
