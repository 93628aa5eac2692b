#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "kernels/fake_quantize.h"
#include "kernels/quant_grid.h"

/// From what was trained to what is stored: codes, scales and zero points of one weight matrix.
namespace moq::exporter {

/// The grid that a parameter was trained on.
struct GridSpec {
  int num_bits = 8;  ///< up to 8: wider codes are not stored
  QuantMode mode = QuantMode::kSymmetric;
  kernels::Granularity granularity = kernels::Granularity::kPerChannel;
  std::int64_t group_size = 0;  ///< as FakeQuantizeTensor's
  bool transposed = false;      ///< storage is [input features, output features] (Conv1D)
  c10::ScalarType scale_dtype = c10::ScalarType::Float;
  ScaleRule scale_rule = ScaleRule::kExtent;
};

/// One weight matrix as a checkpoint stores it, [output features, input features] whatever the
/// parameter's storage.
struct StoredCodes {
  at::Tensor codes;   ///< int8 [out_features, in_features]
  at::Tensor scales;  ///< scale_dtype [out_features, num_groups]; one that rows share is repeated
  at::Tensor zero_points;         ///< int8, as scales; undefined when symmetric
  double quantization_error = 0;  ///< ||master - simulated|| / ||master||; 0 for an all-zero matrix
};

/// Codes of a trained parameter, and the proof that they are the numbers that were trained.
///
/// The grid comes from the master, as in training. Each code is read off the simulated value, which
/// lies on a grid point however it was rounded, and checked: scale * (code - zero_point), rounded
/// to the parameter's dtype, is the simulated value bit for bit, or this throws.
///
/// @param name       names the parameter in errors
/// @param master     2-D, float32, float16 or bfloat16, host memory, any strides
/// @param simulated  its shape; float32, float16 or bfloat16, host memory, any strides
/// @param absmax     [num_groups], float32, host memory, contiguous; of kGiven scales, else
///                   undefined
/// @throws moq::Error naming the parameter and the element for a NaN or an infinity in either
///         tensor, or a simulated value that is not a point of the grid
StoredCodes recover_codes(const std::string& name, const at::Tensor& master,
                          const at::Tensor& simulated, const GridSpec& spec,
                          const at::Tensor& absmax = {});

/// Packs int8 codes [rows, columns] into int32 [rows, ceil(columns * num_bits / 32)]: packing.h.
at::Tensor pack_codes(const at::Tensor& codes, int num_bits);

/// The int8 codes [rows, columns] of packed int32 words [rows, ceil(columns * num_bits / 32)].
at::Tensor unpack_codes(const at::Tensor& words, int num_bits, std::int64_t columns);

}  // namespace moq::exporter
