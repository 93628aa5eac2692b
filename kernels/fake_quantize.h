#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/common/dtype.h"
#include "kernels/grid_search.h"
#include "kernels/quant_grid.h"

struct CUstream_st;

namespace moq::kernels {

/// Which elements of a weight share one scale. Rows are output features, columns input features.
enum class Granularity : std::uint8_t {
  kPerTensor,   ///< one scale
  kPerChannel,  ///< one scale per row
  kPerGroup,    ///< one scale per `group_size` consecutive columns of a row
  kPerRows,     ///< one scale per `group_size` consecutive whole rows
};

/// One weight matrix of a multi-tensor fake-quantize.
///
/// The matrix is [rows, cols] = [output features, input features] whatever its storage: strides
/// describe both torch's Linear ([out, in], row_stride = cols, col_stride = 1) and Hugging Face's
/// Conv1D ([in, out], row_stride = 1, col_stride = rows).
struct FakeQuantizeTensor {
  const void* input = nullptr;  ///< [rows, cols], strided, input_dtype
  void* output = nullptr;       ///< the same strides, output_dtype; null: not written
  /// [rows, cols] contiguous, int8 (num_bits <= 8) or int16; null: not written
  void* codes = nullptr;
  /// [num_groups], scale_dtype, row-major by (row, group); null: not written
  void* scales = nullptr;
  std::int32_t* zero_points = nullptr;  ///< [num_groups]; null: not written
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  ///< elements
  std::int64_t col_stride = 0;  ///< elements
  /// Columns per scale when granularity is kPerGroup, divides cols; rows per scale when it is
  /// kPerRows, divides rows; otherwise not read.
  std::int64_t group_size = 0;
  /// [num_groups], float32; kGiven only: what takes the place of each group's absmax.
  const float* given_absmax = nullptr;
  /// [num_groups], where rows share scales: written by collect_groups, read by fake_quantize
  /// instead of collecting by itself. For a matrix that is a part of a group with other holders.
  GroupCollection* collected = nullptr;
  /// Stochastic rounding draws by the number of an element within the whole parameter, counted
  /// row-major over [rows, cols] whatever the storage, so that every sharding of a parameter draws
  /// the same bits: element (i, j) of this matrix has number first_element + i * unsharded_cols +
  /// j.
  std::int64_t first_element = 0;
  std::int64_t unsharded_cols = 0;  ///< columns of the whole parameter; 0: cols
  /// FNV-1a of the parameter's name: separates the streams of two parameters.
  std::uint32_t name_hash = 0;
  DType input_dtype = DType::kFloat32;
  DType output_dtype = DType::kFloat32;
  DType codes_dtype = DType::kInt8;
  DType scale_dtype = DType::kFloat32;
  Granularity granularity = Granularity::kPerChannel;
  QuantMode mode = QuantMode::kSymmetric;
  Rounding rounding = Rounding::kNearest;
  ScaleRule scale_rule = ScaleRule::kExtent;
};

/// Simulates quantization of many weight matrices in one call (one launch on CUDA):
///
///   q      = clamp(round(w / scale) + zero_point, qmin, qmax), or the sign codes of quant_grid.h
///   output = r * w + (1 - r) * scale * (q - zero_point),   r = blend_ratio
///
/// Statistics, scales and codes are computed as quant_grid.h and grid_search.h define; CPU (every
/// instruction set) and CUDA give the same bits. Bit widths, blend ratios and the random step are
/// data in the tensors' memory, not launch parameters: a CUDA graph replays across bit drops.
///
/// Stochastic rounding: element e of parameter p in step s uses half e % 8 (half_of) of the block
/// that Philox4x32-10 gives for key = seed and counter = {low 32 bits of e / 8, high 32 bits of
/// e / 8, s, name_hash(p)}; its uniform is half * 2^-16. Source: Salmon et al., SC 2011.
///
/// With blend_ratio == 0 output is exactly the dequantized code. A group that holds a NaN or an
/// infinity gives the canonical quiet NaN throughout its output and as its scale, codes and zero
/// point 0; callers that must refuse such weights check first. With num_bits == 0 the output is the
/// input, converted to output_dtype; codes, scales and zero points are not written.
///
/// An output may be its own input if the dtypes agree; otherwise outputs overlap nothing.
struct FakeQuantizeArgs {
  std::span<const FakeQuantizeTensor> tensors;  ///< host memory
  const std::int32_t* num_bits = nullptr;  ///< [tensors.size()], each in [2, 16], 0, or 1 (binary)
  const float* blend_ratio = nullptr;      ///< [tensors.size()], in [0, 1]; null: all 0
  std::uint64_t seed = 0;                  ///< Philox key
  const std::int64_t* step = nullptr;      ///< [1], taken modulo 2^32; null: 0
  /// [1]; non-zero: nothing is written (a step whose gradients overflowed); null: never.
  const float* skip = nullptr;
  /// CUDA only: device memory of fake_quantize_workspace_size bytes, aligned to 8 bytes, that no
  /// other stream uses before this call's work has ended; may be null if that size is 0.
  void* workspace = nullptr;
};

/// Collects what a grid follows from, of the tensors that have `collected` (which must hold zeros
/// before stage 0): in stage 0 the extents of their groups, in stage 1 + i what the sweeps of stage
/// i of grid_search.h sum up. Holders of parts of one group combine what they collected before the
/// next stage and before fake_quantize: the minimum of `lowest`, the maximum of `highest`, sums by
/// addition. Stages without work (of wider widths, of grids of the extent) add zeros.
constexpr int kCollectStages = 1 + kSweepStages;

namespace cpu {
/// As below.
void collect_groups(const FakeQuantizeArgs& args, int stage);

/// All pointers are host memory.
/// @throws moq::Error for an unsupported dtype, a group_size that does not divide cols, a bit width
///         outside the grid or too wide for codes_dtype, a blend ratio outside [0, 1].
void fake_quantize(const FakeQuantizeArgs& args);
}  // namespace cpu

namespace cuda {
/// Bytes that FakeQuantizeArgs::workspace must have: some for each scale that rows share, else 0.
std::size_t fake_quantize_workspace_size(std::span<const FakeQuantizeTensor> tensors);

/// Reads num_bits and skip of the arguments, and needs no workspace.
/// @throws as fake_quantize
void collect_groups(const FakeQuantizeArgs& args, int stage, CUstream_st* stream);

/// Tensor data, num_bits, blend_ratio, step and skip are memory of the current device.
///
/// One launch carries up to 208 tensors of the same dtypes, rounding and storage; tensors that are
/// not whole, aligned vectors, or of which more than simulated values on rounded codes of the
/// extent is wanted, have a launch of their own. What describes them travels by value in the
/// launch's own parameters, so a captured CUDA graph owns it and nothing on the host must outlive
/// the call. Scales that rows share need all of the rows before any of them: only where there are
/// some, more nodes (a memset, a launch for the extents, and one or two for what grid_search.h sums
/// up) come first.
///
/// Bit widths and blend ratios are device data that the host cannot check: a width that has no
/// grid, or one too wide for codes_dtype, gives NaN outputs and scales, and codes and zero points
/// 0.
/// @throws moq::Error for an unsupported dtype, a group_size that does not divide cols, a missing
///         workspace, and if a launch fails.
void fake_quantize(const FakeQuantizeArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
