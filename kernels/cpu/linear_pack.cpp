// Between the row-major weight and the packed one: linear_layout.h says what goes where.
#include <cmath>
#include <cstring>

#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/linear_layout.h"
#include "kernels/linear.h"

namespace moq::kernels {

const char* name_of(WeightFormat format) {
  constexpr const char* kNames[] = {"int8", "int4", "int2", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(format)];
}

namespace cpu {
namespace {

void check_shape(const LinearShape& shape) {
  MOQ_CHECK(shape.n >= 0 && shape.k >= 0, "linear: sizes must be >= 0, got n = ", shape.n,
            ", k = ", shape.k);
  if (!is_integer(shape.format)) {
    MOQ_CHECK(!shape.asymmetric, "linear: only integer weights have zero points, got ",
              name_of(shape.format));
    return;
  }
  MOQ_CHECK(shape.k == 0 || (shape.group_size > 0 && shape.k % shape.group_size == 0),
            "linear: group_size must divide k, got ", shape.group_size, " and ", shape.k);
}

bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 64 == 0;
}

/// One panel of an integer weight, written and read element by element.
class IntegerPanel {
 public:
  IntegerPanel(const IntegerLayout& layout, void* data, std::int64_t index)
      : layout_(layout), data_(static_cast<std::uint8_t*>(data) + index * layout.panel_bytes) {}

  float& scale(std::int64_t row, std::int64_t group) {
    return reinterpret_cast<float*>(data_ + layout_.scales_offset())[group * kPanelRows + row];
  }
  std::int32_t& base(std::int64_t row, std::int64_t group) {
    return reinterpret_cast<std::int32_t*>(data_ +
                                           layout_.bases_offset())[group * kPanelRows + row];
  }
  void set(std::int64_t row, std::int64_t col, std::int64_t element) {
    *byte(row, col) |= static_cast<std::uint8_t>(element << shift(col));
  }
  std::int64_t get(std::int64_t row, std::int64_t col) {
    return (*byte(row, col) >> shift(col)) & ((1 << layout_.bits) - 1);
  }

 private:
  std::int64_t in_block(std::int64_t col) const {
    return col % layout_.group_size % layout_.block_cols();
  }
  std::int64_t shift(std::int64_t col) const { return in_block(col) / kStepCols * layout_.bits; }
  std::uint8_t* byte(std::int64_t row, std::int64_t col) {
    const std::int64_t block = col / layout_.group_size * layout_.blocks_per_group +
                               col % layout_.group_size / layout_.block_cols();
    return data_ + block * kBlockBytes + row * kStepCols + in_block(col) % kStepCols;
  }

  const IntegerLayout& layout_;
  std::uint8_t* data_;
};

void pack_integers(const PackLinearArgs& args) {
  const LinearShape& shape = args.shape;
  const IntegerLayout layout(shape);
  const auto* codes = static_cast<const std::int8_t*>(args.weight);
  const std::int64_t offset = layout.offset();
  const auto in_range = [&](std::int64_t value) { return value >= -offset && value < offset; };
  parallel_for(layout.panels, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      IntegerPanel panel(layout, args.packed, index);
      const std::int64_t first_row = index * kPanelRows;
      for (std::int64_t i = 0; i < kPanelRows && first_row + i < shape.n; ++i) {
        const std::int64_t row = first_row + i;
        for (std::int64_t col = 0; col < shape.k; ++col) {
          const std::int64_t code = codes[row * args.row_stride + col * args.col_stride];
          MOQ_CHECK(in_range(code), "pack_linear: codes must be in [", -offset, ", ", offset - 1,
                    "] for ", name_of(shape.format), ", got ", code, " in row ", row, ", column ",
                    col);
          panel.set(i, col, code + offset);
        }
        for (std::int64_t group = 0; group < layout.groups; ++group) {
          const float scale = args.scales[row * layout.groups + group];
          MOQ_CHECK(std::isfinite(scale), "pack_linear: scales must be finite, got ", scale,
                    " in row ", row, ", group ", group);
          panel.scale(i, group) = scale;
          if (shape.asymmetric) {
            const std::int64_t zero_point = args.zero_points[row * layout.groups + group];
            MOQ_CHECK(in_range(zero_point), "pack_linear: zero points must be in [", -offset, ", ",
                      offset - 1, "] for ", name_of(shape.format), ", got ", zero_point, " in row ",
                      row, ", group ", group);
            panel.base(i, group) = static_cast<std::int32_t>(offset + zero_point);
          }
        }
      }
    }
  });
}

template <typename Element>
void pack_floats(const PackLinearArgs& args) {
  const LinearShape& shape = args.shape;
  const auto* values = static_cast<const Element*>(args.weight);
  auto* packed = static_cast<Element*>(args.packed);
  parallel_for(divide_up(shape.n, kPanelRows), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin * kPanelRows; row < std::min(end * kPanelRows, shape.n); ++row) {
      Element* column = packed + row / kPanelRows * kPanelRows * shape.k + row % kPanelRows;
      for (std::int64_t col = 0; col < shape.k; ++col) {
        column[col * kPanelRows] = values[row * args.row_stride + col * args.col_stride];
      }
    }
  });
}

}  // namespace

std::size_t packed_linear_size(const LinearShape& shape) {
  check_shape(shape);
  if (is_integer(shape.format)) {
    const IntegerLayout layout(shape);
    return shape.k == 0 ? 0 : layout.panels * layout.panel_bytes;
  }
  return divide_up(shape.n, kPanelRows) * kPanelRows * shape.k * bits_of(shape.format) / 8;
}

void pack_linear(const PackLinearArgs& args) {
  const std::size_t size = packed_linear_size(args.shape);
  if (size == 0) {
    return;
  }
  MOQ_CHECK(args.weight != nullptr && args.packed != nullptr,
            "pack_linear: weight and packed must not be null");
  MOQ_CHECK(aligned(args.packed), "pack_linear: packed must be 64-byte aligned");
  MOQ_CHECK(!is_integer(args.shape.format) || args.scales != nullptr,
            "pack_linear: integer weights need scales");
  MOQ_CHECK(!args.shape.asymmetric || args.zero_points != nullptr,
            "pack_linear: asymmetric weights need zero points");
  // Padding must read as finite numbers, and elements narrower than a byte are or-ed in.
  std::memset(args.packed, 0, size);
  switch (args.shape.format) {
    case WeightFormat::kFloat32:
      return pack_floats<float>(args);
    case WeightFormat::kBFloat16:
    case WeightFormat::kFloat16:
      return pack_floats<std::uint16_t>(args);
    default:
      return pack_integers(args);
  }
}

void unpack_linear_row(const PackedLinear& weight, std::int64_t row, float* output) {
  const LinearShape& shape = weight.shape;
  check_shape(shape);
  MOQ_CHECK(row >= 0 && row < shape.n, "unpack_linear_row: row must be in [0, ", shape.n, "), got ",
            row);
  const std::int64_t panel_index = row / kPanelRows;
  const std::int64_t in_panel = row % kPanelRows;
  if (!is_integer(shape.format)) {
    const std::int64_t first = panel_index * kPanelRows * shape.k + in_panel;
    for (std::int64_t col = 0; col < shape.k; ++col) {
      const std::int64_t i = first + col * kPanelRows;
      if (shape.format == WeightFormat::kFloat32) {
        output[col] = static_cast<const float*>(weight.data)[i];
      } else {
        const std::uint16_t bits = static_cast<const std::uint16_t*>(weight.data)[i];
        output[col] = shape.format == WeightFormat::kBFloat16 ? bfloat16_to_float(bits)
                                                              : float16_to_float(bits);
      }
    }
    return;
  }
  const IntegerLayout layout(shape);
  IntegerPanel panel(layout, const_cast<void*>(weight.data), panel_index);
  for (std::int64_t col = 0; col < shape.k; ++col) {
    const std::int64_t group = col / shape.group_size;
    const std::int64_t base = shape.asymmetric ? panel.base(in_panel, group) : layout.offset();
    output[col] =
        static_cast<float>(panel.get(in_panel, col) - base) * panel.scale(in_panel, group);
  }
}

}  // namespace cpu
}  // namespace moq::kernels
