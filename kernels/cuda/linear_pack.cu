// Lays a weight out as kernels/cuda/linear_layout.h says.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/linear.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 16;  // further elements are taken in turn

constexpr std::uint8_t kZeroCode = 128;

/// The weight as the kernel sees it: elements of `Bits` bytes each, bits and nothing else.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    pack_elements(PackLinearArgs args, DeviceLayout layout, Bits flipped, Bits padding) {
  constexpr int kLaneElements = kLaneBytes / static_cast<int>(sizeof(Bits));
  const std::int64_t size = layout.scales_offset / static_cast<std::int64_t>(sizeof(Bits));
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += stride) {
    const std::int64_t block = i / (kBlockBytes / sizeof(Bits));
    const int inside = static_cast<int>(i % (kBlockBytes / sizeof(Bits)));
    const BlockPlace place = lane_element(static_cast<int>(sizeof(Bits)), inside / kLaneElements,
                                          inside % kLaneElements);
    const std::int64_t row = block / layout.col_blocks * kBlockRows + place.row;
    const std::int64_t col = block % layout.col_blocks * layout.block_cols + place.col;
    const bool exists = row < layout.n && col < layout.k;
    static_cast<Bits*>(args.packed)[i] =
        exists ? static_cast<Bits>(static_cast<const Bits*>(
                                       args.weight)[row * args.row_stride + col * args.col_stride] ^
                                   flipped)
               : padding;
  }
}

/// Scales and zero points, [n, groups] to [row blocks][groups][16].
__global__ void __launch_bounds__(kThreads) pack_grids(PackLinearArgs args, DeviceLayout layout) {
  auto* packed = static_cast<char*>(args.packed);
  auto* scales = reinterpret_cast<float*>(packed + layout.scales_offset);
  auto* zero_points = reinterpret_cast<float*>(packed + layout.zero_points_offset);
  const std::int64_t size = layout.row_blocks * layout.groups * kBlockRows;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += stride) {
    const std::int64_t group = i / kBlockRows % layout.groups;
    const std::int64_t row = i / kBlockRows / layout.groups * kBlockRows + i % kBlockRows;
    const std::int64_t source = row * layout.groups + group;
    scales[i] = row < layout.n ? args.scales[source] : 0.0F;
    if (layout.asymmetric) {
      zero_points[i] = row < layout.n ? static_cast<float>(args.zero_points[source]) : 0.0F;
    }
  }
}

unsigned blocks_for(std::int64_t items) {
  const std::int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace

DeviceLayout device_layout(const LinearShape& shape) {
  cpu::packed_linear_size(shape);  // refuses what has no layout
  DeviceLayout layout{};
  layout.n = shape.n;
  layout.k = shape.k;
  layout.element_bytes = is_integer(shape.format) ? 1 : bits_of(shape.format) / 8;
  layout.block_cols = kBlockBytes / kBlockRows / layout.element_bytes;
  layout.row_blocks = pad_to(shape.n, kBlockRows) / kBlockRows;
  layout.col_blocks = pad_to(shape.k, layout.block_cols) / layout.block_cols;
  layout.groups = is_integer(shape.format) ? num_groups(shape) : 0;
  layout.group_size = shape.group_size;
  layout.asymmetric = shape.asymmetric;
  layout.scales_offset = layout.row_blocks * layout.col_blocks * kBlockBytes;
  const std::int64_t grid_bytes =
      layout.row_blocks * layout.groups * kBlockRows * static_cast<std::int64_t>(sizeof(float));
  layout.zero_points_offset = layout.scales_offset + grid_bytes;
  layout.bytes = layout.zero_points_offset + (layout.asymmetric ? grid_bytes : 0);
  return layout;
}

std::size_t packed_linear_size(const LinearShape& shape) {
  return static_cast<std::size_t>(device_layout(shape).bytes);
}

void pack_linear(const PackLinearArgs& args, cudaStream_t stream) {
  const DeviceLayout layout = device_layout(args.shape);
  if (layout.bytes == 0) {
    return;
  }
  const bool integer = is_integer(args.shape.format);
  MOQ_CHECK(args.packed != nullptr &&
                reinterpret_cast<std::uintptr_t>(args.packed) % kPackedAlignment == 0,
            "pack_linear: packed must be aligned to ", kPackedAlignment, " bytes, got ",
            args.packed);
  MOQ_CHECK(args.weight != nullptr, "pack_linear: weight must not be null");
  MOQ_CHECK(!integer || args.scales != nullptr, "pack_linear: scales must not be null");
  MOQ_CHECK(!layout.asymmetric || args.zero_points != nullptr,
            "pack_linear: zero_points must not be null");
  const unsigned blocks = blocks_for(layout.scales_offset / layout.element_bytes);
  switch (layout.element_bytes) {
    case 1:
      launch_in_order(pack_elements<std::uint8_t>, blocks, kThreads, stream, args, layout,
                      kZeroCode, kZeroCode);
      break;
    case 2:
      launch_in_order(pack_elements<std::uint16_t>, blocks, kThreads, stream, args, layout, 0, 0);
      break;
    default:
      launch_in_order(pack_elements<std::uint32_t>, blocks, kThreads, stream, args, layout, 0, 0);
  }
  if (integer) {
    launch_in_order(pack_grids, blocks_for(layout.row_blocks * layout.groups * kBlockRows),
                    kThreads, stream, args, layout);
  }
}

}  // namespace moq::kernels::cuda
