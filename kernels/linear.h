#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/common/dtype.h"
#include "kernels/input_rounding.h"
#include "kernels/norm.h"

struct CUstream_st;

namespace moq::kernels {

/// How a packed weight stores its elements. The integer formats hold codes of quant_grid.h.
enum class WeightFormat : std::uint8_t { kInt8, kInt4, kInt2, kFloat32, kBFloat16, kFloat16 };

constexpr bool is_integer(WeightFormat format) {
  return format <= WeightFormat::kInt2;
}

/// Bits that one element takes: 8, 4, 2, 32, 16, 16.
constexpr int bits_of(WeightFormat format) {
  constexpr int kBits[] = {8, 4, 2, 32, 16, 16};
  return kBits[static_cast<int>(format)];
}

/// "int8", "int4", "int2", "float32", "bfloat16" or "float16".
const char* name_of(WeightFormat format);

/// Geometry of a weight [n, k] = [output features, input features].
struct LinearShape {
  std::int64_t n = 0;
  std::int64_t k = 0;
  WeightFormat format = WeightFormat::kInt8;
  /// Columns that share a scale: k for one scale a row, else a divisor of k. Float formats:
  /// ignored.
  std::int64_t group_size = 0;
  bool asymmetric = false;  ///< codes have zero points; integer formats only

  bool operator==(const LinearShape&) const = default;
};

/// Scales of one row: k / group_size.
constexpr std::int64_t num_groups(const LinearShape& shape) {
  return shape.k == 0 ? 0 : shape.k / shape.group_size;
}

/// A weight in the order the kernels stream it. A view: the bytes belong to the caller.
struct PackedLinear {
  LinearShape shape;
  const void* data = nullptr;  ///< packed_linear_size(shape) bytes, 64-byte aligned
};

/// Input of pack_linear.
struct PackLinearArgs {
  LinearShape shape;
  /// [n, k], strided: int8 codes for every integer format (in the format's range), else values of
  /// the format's own dtype.
  const void* weight = nullptr;
  std::int64_t row_stride = 0;    ///< elements; k for torch's Linear, 1 for Conv1D's [in, out]
  std::int64_t col_stride = 0;    ///< elements; 1 for torch's Linear, n for Conv1D
  const float* scales = nullptr;  ///< [n, num_groups], contiguous; integer formats
  const std::int32_t* zero_points = nullptr;  ///< [n, num_groups], contiguous; when asymmetric
  void* packed = nullptr;  ///< packed_linear_size(shape) bytes, 64-byte aligned, written
};

/// Arguments of `linear`.
struct LinearArgs {
  const float* input = nullptr;  ///< [m, k]
  std::int64_t m = 0;
  std::int64_t input_stride = 0;  ///< elements from row to row
  PackedLinear weight;
  const float* bias = nullptr;  ///< [n], or null
  Activation activation = Activation::kNone;
  /// [m, n], added after the activation, or null; may be `output` where there is no activation.
  const float* residual = nullptr;
  std::int64_t residual_stride = 0;
  InputRounding input_rounding;
  /// Dynamic modes: what each row's grid is made for, where `input` is a part of longer rows
  /// (row-parallel layers), as row_extents in kernels/quantize.h writes it; null: the row's own.
  const float* input_extents = nullptr;
  float* output = nullptr;  ///< [m, n]; must not overlap `input`
  std::int64_t output_stride = 0;
};

namespace cpu {

/// Bytes of a packed weight, padding included.
/// @throws moq::Error for a negative size, a group_size that does not divide k, or an asymmetric
///         float weight.
std::size_t packed_linear_size(const LinearShape& shape);

/// Lays a weight out for `linear`.
/// @throws moq::Error as packed_linear_size, for a null or misaligned pointer, for a code or zero
///         point outside the format's range, or for a scale that is not finite.
void pack_linear(const PackLinearArgs& args);

/// output = activation(input · weightᵀ + bias) + residual for any m >= 0, n >= 0, k >= 0.
///
/// Integer weights. The input row is written as integers x = rint(input * 2^e) (kFloat32; e puts
/// the row's absmax between 2^29 and 2^30, so that elements down to 2^-6 of it are represented
/// exactly and the others within 2^-30 of it), or as those of the 8-bit grid, x = code -
/// zero_point. Then
///
///   sum_g  = Σ over the columns of group g of x * (code - zero_point)      exact, in integers
///   output = float((Σ_g scale_g * sum_g) * unit + bias)                    in float64
///
/// with code, zero_point and scale_g of the weight, where unit is 2^-e or the scale of the 8-bit
/// grid, and a group wider than 8192 columns is cut into pieces of that width. Because the sums are
/// exact, a row's output before the activation depends on nothing but that row and the weight: not
/// on m, the number of threads or the instruction set.
///
/// Float weights: float32 products and sums in blocks of columns; a row's output depends on the
/// instruction set, not on m or the number of threads.
///
/// For integer weights a row that holds a NaN or an infinity gives NaN throughout its output, and
/// so does one whose input_extents hold a NaN or an infinity; on a static grid an infinity is
/// limited like any other large number. Runs on up to num_threads() threads
/// (kernels/common/parallel.h).
/// @throws moq::Error for inconsistent sizes or strides, a null pointer to something non-empty, a
///         packed weight that is not aligned, an INT8 input mode with float weights, a static mode
///         without a grid, a scale or zero point in another, input_extents without a dynamic mode,
///         or an activation over a residual that is the output.
void linear(const LinearArgs& args);

}  // namespace cpu

/// The projection of q, k and v on a GPU: rotates q and k, and appends k and v to the cache. Rows
/// of the weight are those of the heads of q, then of k, then of v.
struct DeviceQkvOutput {
  std::int32_t head_dim = 0;  ///< even; 0: not such a projection
  std::int32_t num_heads = 0;
  std::int32_t num_kv_heads = 0;
  /// With rotary_dim > 0, rows 2i and 2i + 1 of a head of q or k (i < rotary_dim / 2) are its
  /// dimensions i and i + rotary_dim / 2, which are rotated together.
  DeviceRotary rotary = {};
  /// Null keys: all goes to the output, [m, q | k | v]. Otherwise k and v go to the cache (of the
  /// activations' dtype), and the output is [m, q].
  DevicePages pages = {};
  const std::int32_t* cache_rows = nullptr;  ///< [m], see DevicePages; < 0: not written
};

/// Arguments of `linear` on a GPU. All pointers are device memory.
struct DeviceLinearArgs {
  const void* input = nullptr;  ///< [m, k], dtype
  std::int64_t m = 0;
  std::int64_t input_stride = 0;  ///< elements from row to row
  PackedLinear weight = {};       ///< of cuda::pack_linear
  const void* bias = nullptr;     ///< [n], dtype, or null
  Activation activation = Activation::kNone;
  /// [m, n], dtype, added after the activation, or null; may be `output`.
  const void* residual = nullptr;
  std::int64_t residual_stride = 0;
  void* output = nullptr;  ///< [m, n], dtype; must not overlap `input`
  std::int64_t output_stride = 0;
  DType dtype = DType::kFloat16;  ///< of the activations: float16, bfloat16 or float32
  /// Normalises the input rows first: the result is rounded to dtype, then multiplied. For m <= 8.
  DeviceNorm norm = {};
  /// [m]: a factor of each row's sums, before the bias (the step sizes of INT8 inputs, of whose
  /// codes `input` holds the distances from the zero point); null: 1.
  const float* row_scales = nullptr;
  /// Rows 2j and 2j + 1 of the weight are gate and up of column j: the output is [m, n / 2],
  /// activation(gate) * up, without a residual. n is even.
  bool gated = false;
  bool float32_output = false;  ///< output is float32, whatever dtype is; without a residual
  DeviceQkvOutput qkv = {};     ///< without activation, residual, gated or float32_output
  /// Reads the weight, the bias and the norm's weight and bias before the kernels ahead in the
  /// stream have ended. Only if none of them writes any of these: the weight was packed, and the
  /// stream synchronized, earlier.
  bool weight_is_ready = false;
  /// The kernel ahead fills some multiprocessors and leaves others empty, as attention over few
  /// heads does: a large product puts no two blocks on one of them.
  bool spread = false;
  /// Kernels that begin early, as this one does, run around it: its blocks leave room for theirs.
  /// Else a large product without a norm takes the room itself.
  bool in_chain = false;
  /// The weight that is multiplied next, if that is known: products of some tokens bring it to the
  /// L2 cache while they run. It must have been written earlier, as with weight_is_ready.
  const void* next_weight = nullptr;  ///< aligned to 16 bytes
  std::int64_t next_bytes = 0;        ///< a multiple of 16
};

namespace cuda {

/// Bytes of a packed weight, padding included. An element of an integer format takes a byte,
/// whatever its width.
/// @throws moq::Error as cpu::packed_linear_size.
std::size_t packed_linear_size(const LinearShape& shape);

/// Whether `linear` can normalise its input for m tokens: m <= 8.
constexpr bool linear_takes_norm(std::int64_t m) {
  return m <= 8;
}

/// Whether `linear` with these arguments should normalise its input, rather than read what `norm`
/// wrote: not where it takes no norm, nor where only its plain kernel does (before compute
/// capability 9.0) and tensor cores multiply without. Reads m, the weight's shape and dtype.
/// @throws moq::Error for a shape that packed_linear_size refuses
bool linear_prefers_norm(const DeviceLinearArgs& args);

/// Lays a weight out for `linear`; all pointers of args are device memory. Codes and zero points
/// must lie in the format's range: they are not looked at here.
/// @throws moq::Error as packed_linear_size, for a null or misaligned pointer, or if the launch
///         fails.
void pack_linear(const PackLinearArgs& args, CUstream_st* stream);

/// output = activation(norm(input) · weightᵀ * row_scales + bias) + residual for any m >= 0, n >=
/// 0, k >= 0, or what `gated` or `qkv` make of it.
///
/// Weights are read as they are stored and converted in registers: scale * (code - zero_point) is
/// exact in float16 and bfloat16 but for the scale, which multiplies the float32 sum of a group.
/// Products are exact, sums are float32, and the result is rounded to dtype once. The order of a
/// sum depends on the weight's shape and row, on dtype, on the GPU and on m, alike for 1 <= m <= 8
/// unless the input is so wide that only one token of it fits into a thread block: then m = 1, 2 <=
/// m <= 4 and, without a norm, 5 <= m <= 8 differ; not on the token's place. Statistics of a norm
/// are float32: the mean first, then the variance of the differences; where the weight is streamed,
/// both in one pass over differences from one of the numbers.
///
/// On compute capability 9.0 up to 8 tokens stream the weight through shared memory by bulk copies,
/// and normalise what they multiply. More tokens, more than 4 of so wide an input that has no norm,
/// and without a norm older GPUs, multiply tiles on tensor cores where k and
/// input_stride are multiples of 8 and the input is aligned to 16 bytes; compute capability 9.0 has
/// tiles of its own, for any k. Otherwise, and for what tensor cores do not multiply (float32; a
/// float weight of another dtype than the activations; groups that are no multiple of 32 columns),
/// a plain kernel computes in float32.
/// @throws moq::Error for inconsistent sizes, strides or combinations, a null pointer to something
///         non-empty, a packed weight that is not aligned, or a launch that fails.
void linear(const DeviceLinearArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace moq::kernels
