#pragma once

#include "kernels/cpu/simd/vector.h"

/// Square blocks of kWidth vectors, transposed in log2(kWidth) stages: in each, vectors whose
/// numbers differ in one bit exchange half of their lanes.
namespace moq::kernels::cpu::MOQ_ISA {

#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
/// Lane l of the result is a[l] where bit kBit of l is clear, else b[l - kBit].
template <int kBit>
[[gnu::always_inline]] inline F32 join_low(F32 a, F32 b) {
  I32 order{};
  for (int lane = 0; lane < kWidth; ++lane) {
    order[lane] = (lane & kBit) != 0 ? kWidth + lane - kBit : lane;
  }
  return __builtin_shuffle(a, b, order);
}

/// Lane l of the result is a[l + kBit] where bit kBit of l is clear, else b[l].
template <int kBit>
[[gnu::always_inline]] inline F32 join_high(F32 a, F32 b) {
  I32 order{};
  for (int lane = 0; lane < kWidth; ++lane) {
    order[lane] = (lane & kBit) != 0 ? kWidth + lane : lane + kBit;
  }
  return __builtin_shuffle(a, b, order);
}
#endif

/// rows[i][j] becomes rows[j][i].
template <int kBit = kWidth / 2>
[[gnu::always_inline]] inline void transpose(F32 (&rows)[kWidth]) {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  for (int i = 0; i < kWidth; ++i) {
    if ((i & kBit) == 0) {
      const F32 low = join_low<kBit>(rows[i], rows[i + kBit]);
      rows[i + kBit] = join_high<kBit>(rows[i], rows[i + kBit]);
      rows[i] = low;
    }
  }
  if constexpr (kBit > 1) {
    transpose<kBit / 2>(rows);
  }
#else
  static_cast<void>(rows);
#endif
}

}  // namespace moq::kernels::cpu::MOQ_ISA
