// From the row-major weight to the packed one: linear_layout.h says what goes where.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/linear_layout.h"
#include "kernels/linear.h"

namespace moq::kernels {

const char* name_of(WeightFormat format) {
  constexpr const char* kNames[] = {"int8", "int4", "int2", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(format)];
}

namespace cpu {

IntegerLayout integer_layout(const LinearShape& shape) {
  IntegerLayout layout{};
  layout.bits = bits_of(shape.format);
  layout.offset = std::int64_t{1} << (layout.bits - 1);
  layout.groups = num_groups(shape);
  layout.group_size = shape.group_size;
  layout.block_cols = kStepCols * (8 / layout.bits);
  layout.blocks_per_group = divide_up(shape.group_size, layout.block_cols);
  layout.piece_blocks = kPieceCols / layout.block_cols;
  layout.pieces = layout.groups * divide_up(layout.blocks_per_group, layout.piece_blocks);
  layout.padded_cols = layout.groups * layout.blocks_per_group * layout.block_cols;
  layout.panels = divide_up(shape.n, kPanelRows);
  layout.scales_offset = layout.groups * layout.blocks_per_group * kBlockBytes;
  layout.bases_offset =
      layout.scales_offset + layout.groups * kPanelRows * static_cast<std::int64_t>(sizeof(float));
  layout.panel_bytes =
      shape.asymmetric ? 2 * layout.bases_offset - layout.scales_offset : layout.bases_offset;
  layout.asymmetric = shape.asymmetric;
  return layout;
}

void check_packed(const char* where, const void* data) {
  MOQ_CHECK(data != nullptr, where, ": the packed weight must not be null");
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  MOQ_CHECK(address % kPackedAlignment == 0, where, ": the packed weight must be aligned to ",
            kPackedAlignment, " bytes, got an address ", address % kPackedAlignment, " above");
}

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

/// Calls visit(col, byte, shift) for every column of row `row` of a panel: its element lies in
/// *byte, `shift` bits up.
template <typename Visit>
void for_each_element(const IntegerLayout& layout, std::uint8_t* panel, std::int64_t row,
                      const Visit& visit) {
  std::uint8_t* bytes = panel + row * kStepCols;
  for (std::int64_t group = 0; group < layout.groups; ++group) {
    const std::int64_t end = (group + 1) * layout.group_size;
    std::int64_t col = group * layout.group_size;
    for (std::int64_t block = 0; block < layout.blocks_per_group; ++block, bytes += kBlockBytes) {
      for (std::int64_t shift = 0; shift < 8; shift += layout.bits) {
        for (std::int64_t i = 0; i < kStepCols && col < end; ++i, ++col) {
          visit(col, bytes + i, shift);
        }
      }
    }
  }
}

/// Packs one row; `panel` is zero so far.
void pack_row(const PackLinearArgs& args, const IntegerLayout& layout, std::int64_t row,
              std::uint8_t* panel) {
  const std::int64_t offset = layout.offset;
  const auto check_range = [&](const char* what, std::int64_t value, const char* of,
                               std::int64_t place) {
    MOQ_CHECK(value >= -offset && value < offset, "pack_linear: ", what, " must be in [", -offset,
              ", ", offset - 1, "] for ", name_of(args.shape.format), ", got ", value, " in row ",
              row, ", ", of, " ", place);
  };
  const auto* codes = static_cast<const std::int8_t*>(args.weight) + row * args.row_stride;
  for_each_element(layout, panel, row % kPanelRows,
                   [&](std::int64_t col, std::uint8_t* byte, std::int64_t shift) {
                     const std::int8_t code = codes[col * args.col_stride];
                     check_range("codes", code, "column", col);
                     *byte |= static_cast<std::uint8_t>((code + offset) << shift);
                   });
  auto* scales = reinterpret_cast<float*>(panel + layout.scales_offset) + row % kPanelRows;
  auto* bases = reinterpret_cast<std::int32_t*>(panel + layout.bases_offset) + row % kPanelRows;
  for (std::int64_t group = 0; group < layout.groups; ++group) {
    const float scale = args.scales[row * layout.groups + group];
    MOQ_CHECK(std::isfinite(scale), "pack_linear: scales must be finite, got ", scale, " in row ",
              row, ", group ", group);
    scales[group * kPanelRows] = scale;
    if (layout.asymmetric) {
      const std::int64_t zero_point = args.zero_points[row * layout.groups + group];
      check_range("zero points", zero_point, "group", group);
      bases[group * kPanelRows] = static_cast<std::int32_t>(offset + zero_point);
    }
  }
}

void pack_integers(const PackLinearArgs& args) {
  const IntegerLayout layout = integer_layout(args.shape);
  parallel_for(layout.panels, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t last_row = std::min(end * kPanelRows, args.shape.n);
    for (std::int64_t row = begin * kPanelRows; row < last_row; ++row) {
      pack_row(args, layout, row,
               static_cast<std::uint8_t*>(args.packed) + row / kPanelRows * layout.panel_bytes);
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
  if (shape.k == 0) {
    return 0;
  }
  if (is_integer(shape.format)) {
    const IntegerLayout layout = integer_layout(shape);
    return layout.panels * layout.panel_bytes;
  }
  return divide_up(shape.n, kPanelRows) * kPanelRows * shape.k * bits_of(shape.format) / 8;
}

void pack_linear(const PackLinearArgs& args) {
  const std::size_t size = packed_linear_size(args.shape);
  if (size == 0) {
    return;
  }
  MOQ_CHECK(args.weight != nullptr, "pack_linear: weight must not be null");
  check_packed("pack_linear", args.packed);
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
      return pack_floats<BFloat16>(args);
    case WeightFormat::kFloat16:
      return pack_floats<Float16>(args);
    case WeightFormat::kInt8:
    case WeightFormat::kInt4:
    case WeightFormat::kInt2:
      return pack_integers(args);
  }
}

}  // namespace cpu
}  // namespace moq::kernels
