#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace moq::kernels::cpu {

/// Frees what make_aligned_floats allocated.
struct AlignedDelete {
  static constexpr std::align_val_t kAlignment{64};
  void operator()(float* data) const { ::operator delete[](data, kAlignment); }
};

using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

/// `size` floats, not initialised, aligned to cache lines: a vector never straddles two of them.
inline AlignedFloats make_aligned_floats(std::int64_t size) {
  return AlignedFloats(new (AlignedDelete::kAlignment) float[static_cast<std::size_t>(size)]);
}

}  // namespace moq::kernels::cpu
