// Checks, batches and threads of the linear kernel; the arithmetic is in simd/linear_int.cpp and
// simd/linear_float.cpp.
#include "kernels/linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "kernels/activation.h"
#include "kernels/common/check.h"
#include "kernels/common/input_rounding_check.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cpu {
namespace {

/// A batch of rows is rearranged at once; it should stay in the second-level cache or near it.
constexpr std::int64_t kBatchBytes = 1 << 20;
/// Bytes of a weight, and elements of an input, that are worth the hand-over to another thread.
constexpr std::int64_t kGrainBytes = 32 << 10;

void check(const LinearArgs& args) {
  const LinearShape& shape = args.weight.shape;
  const std::size_t packed_size = packed_linear_size(shape);
  MOQ_CHECK(args.m >= 0, "linear: m must be >= 0, got ", args.m);
  const InputRounding& rounding = args.input_rounding;
  MOQ_CHECK(is_integer(shape.format) || rounding.mode == InputMode::kFloat32,
            "linear: INT8 input needs an integer weight, got ", name_of(shape.format));
  kernels::check("linear", rounding);
  MOQ_CHECK(args.input_extents == nullptr || is_dynamic(rounding.mode),
            "linear: input_extents need a dynamic INT8 input mode, got ", name_of(rounding.mode));
  MOQ_CHECK(args.activation == Activation::kNone || args.residual == nullptr ||
                args.residual != args.output,
            "linear: the residual may be the output only without an activation, got ",
            name_of(args.activation));
  if (args.m == 0 || shape.n == 0) {
    return;
  }
  if (packed_size > 0) {
    check_packed("linear", args.weight.data);
  }
  MOQ_CHECK(shape.k == 0 || args.input != nullptr, "linear: input must not be null");
  MOQ_CHECK(args.output != nullptr, "linear: output must not be null");
  MOQ_CHECK(args.m == 1 || args.input_stride >= shape.k, "linear: input_stride must be >= k, got ",
            args.input_stride, " and ", shape.k);
  MOQ_CHECK(args.m == 1 || args.output_stride >= shape.n,
            "linear: output_stride must be >= n, got ", args.output_stride, " and ", shape.n);
  MOQ_CHECK(args.residual == nullptr || args.m == 1 || args.residual_stride >= shape.n,
            "linear: residual_stride must be >= n, got ", args.residual_stride, " and ", shape.n);
}

/// Memory for the rearranged input: kept by the calling thread from call to call, since a decode
/// step makes hundreds of them.
class Scratch {
 public:
  /// `size` bytes, aligned to 64, valid until the next call on this thread.
  static std::uint8_t* get(std::int64_t size) {
    thread_local Scratch scratch;
    if (scratch.size_ < size) {
      scratch.data_.reset();
      scratch.size_ = 0;
      scratch.data_.reset(new (kAlignment) std::uint8_t[size]);
      scratch.size_ = size;
    }
    return scratch.data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(std::uint8_t* data) const { ::operator delete[](data, kAlignment); }
  };
  std::unique_ptr<std::uint8_t[], Delete> data_;
  std::int64_t size_ = 0;
};

/// Rows of a batch: batches of about the same size.
std::int64_t batch_rows(std::int64_t m, std::int64_t row_bytes) {
  return divide_up(m, std::max<std::int64_t>(divide_up(m * row_bytes, kBatchBytes), 1));
}

/// The rows of the result that a batch beginning at `row` writes. With an activation the residual
/// comes after it, in finish().
OutputRows output_rows(const LinearArgs& args, std::int64_t row, std::int64_t rows,
                       std::int64_t tiles) {
  const bool adds_residual = args.residual != nullptr && args.activation == Activation::kNone;
  return {.rows = rows,
          .tiles = tiles,
          .n = args.weight.shape.n,
          .bias = args.bias,
          .residual = adds_residual ? args.residual + row * args.residual_stride : nullptr,
          .residual_stride = args.residual_stride,
          .output = args.output + row * args.output_stride,
          .output_stride = args.output_stride};
}

/// Applies the activation, and the residual after it, to a part of a batch beginning at `row`.
void finish(const LinearArgs& args, std::int64_t row, const OutputRows& batch, const Part& part) {
  if (args.activation == Activation::kNone) {
    return;
  }
  const std::int64_t first = part.first_panel * kPanelRows;
  const std::int64_t size = std::min(part.last_panel * kPanelRows, batch.n) - first;
  const std::int64_t end = row + tile_begin(part.last_tile, batch.rows, batch.tiles);
  for (std::int64_t i = row + tile_begin(part.first_tile, batch.rows, batch.tiles); i < end; ++i) {
    float* output = args.output + i * args.output_stride + first;
    activation({.input = output, .output = output, .size = size, .activation = args.activation});
    if (args.residual != nullptr) {
      const float* residual = args.residual + i * args.residual_stride + first;
      for (std::int64_t j = 0; j < size; ++j) {
        output[j] += residual[j];
      }
    }
  }
}

/// Calls multiply(part) for all parts of a batch beginning at `row` on several threads. Threads get
/// panels of their own, and parts of the rows as well if there are few panels.
template <typename Multiply>
void for_parts(const LinearArgs& args, std::int64_t row, const OutputRows& batch,
               const Multiply& multiply) {
  const LinearShape& shape = args.weight.shape;
  const std::int64_t panels = divide_up(shape.n, kPanelRows);
  const std::int64_t wanted = num_threads() == 1 ? 1 : num_threads() * std::int64_t{4};
  const std::int64_t row_parts = std::min(divide_up(wanted, panels), batch.tiles);
  const std::int64_t bytes = std::max<std::int64_t>(
      kPanelRows * shape.k * bits_of(shape.format) / 8 * batch.rows / row_parts, 1);
  parallel_for(panels * row_parts, divide_up(kGrainBytes, bytes),
               [&](std::int64_t begin, std::int64_t end) {
                 while (begin < end) {
                   const std::int64_t i = begin / panels;
                   const std::int64_t stop = std::min((i + 1) * panels, end);
                   const Part part = {.first_tile = i * batch.tiles / row_parts,
                                      .last_tile = (i + 1) * batch.tiles / row_parts,
                                      .first_panel = begin - i * panels,
                                      .last_panel = stop - i * panels};
                   multiply(part);
                   finish(args, row, batch, part);
                   begin = stop;
                 }
               });
}

/// Calls rearrange(tile, its rows) for the tiles of a batch on several threads.
template <typename Rearrange>
void for_tiles(std::int64_t rows, std::int64_t tiles, std::int64_t k, const Rearrange& rearrange) {
  const std::int64_t grain =
      divide_up(kGrainBytes, std::max<std::int64_t>(k * divide_up(rows, tiles), 1));
  parallel_for(tiles, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      rearrange(tile, tile_begin(tile + 1, rows, tiles) - tile_begin(tile, rows, tiles));
    }
  });
}

void linear_integer(const LinearArgs& args) {
  const IntegerLayout layout = integer_layout(args.weight.shape);
  const InputMode mode = args.input_rounding.mode;
  const DigitFormat format = MOQ_DISPATCH_ISA(digit_format, mode);
  const std::int64_t vector_bytes = layout.padded_cols * format.digit_bytes;
  const std::int64_t row_bytes = vector_bytes * format.digits;
  const std::int64_t ones_bytes = vector_bytes * format.ones;  // of a tile
  const std::int64_t capacity = batch_rows(args.m, row_bytes);
  const std::int64_t digits_bytes =
      round_up(capacity * row_bytes + divide_up(capacity, format.tile_rows) * ones_bytes, 64);
  const std::int64_t sums_bytes =
      capacity * layout.pieces * static_cast<std::int64_t>(sizeof(double));
  const std::int64_t units_bytes = capacity * static_cast<std::int64_t>(sizeof(double));
  const std::int64_t zero_points_bytes = capacity * static_cast<std::int64_t>(sizeof(std::int32_t));
  std::uint8_t* scratch = Scratch::get(digits_bytes + sums_bytes + units_bytes + zero_points_bytes);
  std::uint8_t* sums = scratch + digits_bytes;
  std::uint8_t* units = sums + sums_bytes;
  const DigitRows input = {.digits = scratch,
                           .sums = reinterpret_cast<double*>(sums),
                           .units = reinterpret_cast<double*>(units),
                           .zero_points = reinterpret_cast<std::int32_t*>(units + units_bytes)};
  const float* below = args.input_extents;
  const float* above = below == nullptr || is_symmetric(grid_mode(mode)) ? below : below + args.m;

  for (std::int64_t row = 0; row < args.m; row += capacity) {
    const std::int64_t rows = std::min(capacity, args.m - row);
    const std::int64_t tiles = divide_up(rows, format.tile_rows);
    for_tiles(rows, tiles, layout.padded_cols, [&](std::int64_t tile, std::int64_t count) {
      const std::int64_t i = tile_begin(tile, rows, tiles);
      const SplitArgs split = {
          .input = args.input + (row + i) * args.input_stride,
          .input_stride = args.input_stride,
          .rows = count,
          .rounding = args.input_rounding,
          .input_below = below == nullptr ? nullptr : below + row + i,
          .input_above = above == nullptr ? nullptr : above + row + i,
          .output = {.digits = input.digits + i * row_bytes + tile * ones_bytes,
                     .sums = input.sums + i * layout.pieces,
                     .units = input.units + i,
                     .zero_points = input.zero_points + i}};
      MOQ_DISPATCH_ISA(split_rows, split, layout);
    });
    const IntegerMultiplyArgs multiply = {
        .input = input,
        .mode = mode,
        .weight = static_cast<const std::uint8_t*>(args.weight.data),
        .output = output_rows(args, row, rows, tiles)};
    for_parts(args, row, multiply.output, [&](const Part& part) {
      MOQ_DISPATCH_ISA(multiply_integers, multiply, layout, part);
    });
  }
}

void linear_float(const LinearArgs& args) {
  const LinearShape& shape = args.weight.shape;
  const std::int64_t tile_rows = MOQ_DISPATCH_ISA(float_tile_rows);
  const std::int64_t row_bytes = shape.k * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t capacity = batch_rows(args.m, row_bytes);
  auto* input = reinterpret_cast<float*>(Scratch::get(capacity * row_bytes));

  for (std::int64_t row = 0; row < args.m; row += capacity) {
    const std::int64_t rows = std::min(capacity, args.m - row);
    const std::int64_t tiles = divide_up(rows, tile_rows);
    for_tiles(rows, tiles, shape.k, [&](std::int64_t index, std::int64_t count) {
      const std::int64_t i = tile_begin(index, rows, tiles);
      float* tile = input + i * shape.k;  // [k, count]
      for (std::int64_t j = 0; j < count; ++j) {
        const float* values = args.input + (row + i + j) * args.input_stride;
        for (std::int64_t col = 0; col < shape.k; ++col) {
          tile[col * count + j] = values[col];
        }
      }
    });
    const FloatMultiplyArgs multiply = {.input = input,
                                        .format = shape.format,
                                        .weight = args.weight.data,
                                        .k = shape.k,
                                        .output = output_rows(args, row, rows, tiles)};
    for_parts(args, row, multiply.output,
              [&](const Part& part) { MOQ_DISPATCH_ISA(multiply_floats, multiply, part); });
  }
}

}  // namespace

void linear(const LinearArgs& args) {
  check(args);
  if (args.m == 0 || args.weight.shape.n == 0) {
    return;
  }
  // Without columns there is nothing to multiply, whatever the format: the bias remains.
  if (is_integer(args.weight.shape.format) && args.weight.shape.k > 0) {
    linear_integer(args);
  } else {
    linear_float(args);
  }
}

}  // namespace moq::kernels::cpu
