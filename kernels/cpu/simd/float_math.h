#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/cpu/simd/vector.h"

/// What the float kernels need beyond vector.h: partial vectors, sums, and
/// elementary functions. Error bounds are against the exact function of the float32 argument, in
/// units in the last place, as float_math_test.cc measures them.
namespace moq::kernels::cpu::MOQ_ISA {

/// a * a - square, the part of a's square that its rounding lost.
[[gnu::always_inline]] inline F32 square_error(F32 a, F32 square) {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  return multiply_add(a, a, -square);
#else
  return static_cast<float>(static_cast<double>(a) * a - square);
#endif
}

[[gnu::always_inline]] inline F32 square_root(F32 value) {
#if defined(MOQ_ISA_avx512)
  return _mm512_sqrt_ps(value);
#elif defined(MOQ_ISA_avx2)
  return _mm256_sqrt_ps(value);
#else
  return std::sqrt(value);
#endif
}

/// |magnitude| with the sign of `sign`.
[[gnu::always_inline]] inline F32 copy_sign(F32 magnitude, F32 sign) {
  return bit_cast<F32>((bit_cast<U32>(magnitude) & 0x7fffffffU) |
                       (bit_cast<U32>(sign) & 0x80000000U));
}

/// 0, 1, …, kWidth - 1.
[[gnu::always_inline]] inline I32 lane_numbers() {
  I32 lanes{};
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  for (int i = 0; i < kWidth; ++i) {
    lanes[i] = i;
  }
#endif
  return lanes;
}

/// The first `count` elements, 0 <= count < kWidth, and zeros. Reads nothing behind them.
[[gnu::always_inline]] inline F32 load_first(const float* input, std::int64_t count) {
#if defined(MOQ_ISA_avx512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << count) - 1), input);
#elif defined(MOQ_ISA_avx2)
  const I32 mask = lane_numbers() < static_cast<std::int32_t>(count);
  return _mm256_maskload_ps(input, bit_cast<__m256i>(mask));
#else
  return count > 0 ? *input : 0.0F;
#endif
}

/// Stores the first `count` elements, 0 <= count < kWidth.
[[gnu::always_inline]] inline void store_first(float* output, F32 value, std::int64_t count) {
#if defined(MOQ_ISA_avx512)
  _mm512_mask_storeu_ps(output, static_cast<__mmask16>((1U << count) - 1), value);
#elif defined(MOQ_ISA_avx2)
  const I32 mask = lane_numbers() < static_cast<std::int32_t>(count);
  _mm256_maskstore_ps(output, bit_cast<__m256i>(mask), value);
#else
  if (count > 0) {
    *output = value;
  }
#endif
}

/// Calls body(vector) on `size` elements in turn, the last vector filled up with `fill`.
template <typename Body>
[[gnu::always_inline]] inline void for_each_vector(const float* input, std::int64_t size,
                                                   float fill, const Body& body) {
  std::int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    body(load(input + i));
  }
  if (i < size) {
    const I32 inside = lane_numbers() < static_cast<std::int32_t>(size - i);
    body(inside ? load_first(input + i, size - i) : broadcast(fill));
  }
}

/// output[i] = function(inputs[i]...) for `size` elements; output may be one of the inputs.
template <typename Function, typename... Inputs>
[[gnu::always_inline]] inline void map(float* output, std::int64_t size, const Function& function,
                                       const Inputs*... inputs) {
  std::int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    store(output + i, function(load(inputs + i)...));
  }
  if (i < size) {
    store_first(output + i, function(load_first(inputs + i, size - i)...), size - i);
  }
}

/// Sum of the elements, by halves.
[[gnu::always_inline]] inline float reduce_add(F32 value) {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
#if defined(MOQ_ISA_avx512)
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
#else
  const __m256 eight = value;
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  return value;
#endif
}

/// Largest element; unspecified if one is NaN.
[[gnu::always_inline]] inline float reduce_max(F32 value) {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
#if defined(MOQ_ISA_avx512)
  const __m256 eight =
      _mm256_max_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
#else
  const __m256 eight = value;
#endif
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
  return value;
#endif
}

/// value * 2^exponent for integral exponents in [-150, 128], subnormal and infinite results
/// included.
[[gnu::always_inline]] inline F32 scale_by_power(F32 value, F32 exponent) {
#if defined(MOQ_ISA_avx512)
  return _mm512_scalef_ps(value, exponent);
#else
  // Two factors: 2^128 and 2^-150 themselves are not normal numbers.
  const I32 n = convert<I32>(exponent);
  const I32 half = n >> 1;
  return value * bit_cast<F32>((half + 127) << 23) * bit_cast<F32>((n - half + 127) << 23);
#endif
}

/// c[0] + c[1] * x + c[2] * x^2 + …
template <std::size_t kSize>
[[gnu::always_inline]] inline F32 polynomial(F32 x, const float (&c)[kSize]) {
  F32 sum = broadcast(c[kSize - 1]);
  for (std::size_t i = 2; i <= kSize; ++i) {
    sum = multiply_add(sum, x, broadcast(c[kSize - i]));
  }
  return sum;
}

/// e^x within 1.1 ulp; 0 below -104, infinity above 88.73.
///
/// x = n ln 2 + r with |r| <= ln(2) / 2, e^x = 2^n (1 + r + r^2 q(r)); q is the Chebyshev fit of
/// degree 4, whose error is below 8e-9 of the result. ln 2 is split so that n * kHigh is exact.
[[gnu::always_inline]] inline F32 exponential(F32 x) {
  constexpr float kLog2E = 1.44269504F;
  constexpr float kHigh = 0.693145751953125F;
  constexpr float kLow = 1.42860677e-06F;
  constexpr float kQ[] = {5.000000000e-01F, 1.666657627e-01F, 4.166655242e-02F, 8.363232948e-03F,
                          1.392625039e-03F};
  x = maximum(broadcast(-104.0F), minimum(broadcast(89.0F), x));  // the order lets a NaN through
  const F32 n = round_nearest(x * kLog2E);
  const F32 r = multiply_add(n, broadcast(-kLow), multiply_add(n, broadcast(-kHigh), x));
  const F32 tail = multiply_add(polynomial(r, kQ), r * r, r);
  return scale_by_power(1.0F + tail, n);
}

/// 1 / (1 + e^-x) within 2.5 ulp where it is a normal number.
[[gnu::always_inline]] inline F32 sigmoid(F32 x) {
  return 1.0F / (1.0F + exponential(-x));
}

/// tanh(x) within 2 ulp: x + x^3 p(x^2) below 0.6, else 1 - 2 / (e^2x + 1).
[[gnu::always_inline]] inline F32 hyperbolic_tangent(F32 x) {
  constexpr float kP[] = {-3.333333433e-01F, 1.333331317e-01F,  -5.396155268e-02F,
                          2.178832144e-02F,  -8.410071023e-03F, 2.370765666e-03F};
  const F32 magnitude = absolute(x);
  const F32 square = x * x;
  const F32 small = multiply_add(x * square, polynomial(square, kP), x);
  const F32 large = 1.0F - 2.0F / (exponential(magnitude + magnitude) + 1.0F);
  return magnitude < 0.6F ? small : copy_sign(large, x);
}

/// Phi(-|x|), the standard normal distribution's tail, within 4 ulp where it is a normal number.
///
/// Phi(-x) = exp(-x^2 / 2) g(t) / (1 + 1.25 x) with t = (x - 4) / (x + 4): g is nearly flat on
/// [0, infinity), its Chebyshev fit of degree 10 has a relative error below 4e-9. The form is that
/// of Shepherd & Laframboise, Mathematics of Computation 36 (1981).
[[gnu::always_inline]] inline F32 normal_tail(F32 x) {
  constexpr float kG[] = {5.664638281e-01F,  -7.827990502e-02F, -1.359527465e-02F,
                          5.367681384e-02F,  -4.796341062e-02F, 2.454816923e-02F,
                          -6.379355211e-03F, -5.378539790e-04F, 9.075317648e-04F,
                          -6.807586033e-05F, -9.418948321e-05F};
  x = minimum(broadcast(14.5F), absolute(x));  // where the tail has underflown
  const F32 t = (x - 4.0F) / (x + 4.0F);
  const F32 square = x * x;
  const F32 gaussian = exponential(-0.5F * square);
  const F32 corrected = multiply_add(gaussian, -0.5F * square_error(x, square), gaussian);
  return corrected * polynomial(t, kG) / multiply_add(broadcast(1.25F), x, broadcast(1.0F));
}

/// The functions of Activation, one class each, so that a kernel is compiled for each.
template <Activation kActivation>
[[gnu::always_inline]] inline F32 activate(F32 x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x < 0.0F ? F32{} : x;
  } else if constexpr (kActivation == Activation::kGelu) {
    const F32 tail = x * normal_tail(x);
    return x < 0.0F ? tail : x - tail;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), which cancels nothing where u is negative.
    constexpr float kTwiceRoot = 1.59576912F;  // 2 sqrt(2 / pi)
    const F32 u = x * kTwiceRoot * multiply_add(x * x, broadcast(0.044715F), broadcast(1.0F));
    return x * sigmoid(u);
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    return x * sigmoid(1.702F * x);
  } else if constexpr (kActivation == Activation::kSilu) {
    return x * sigmoid(x);
  } else if constexpr (kActivation == Activation::kTanh) {
    return hyperbolic_tangent(x);
  } else {
    return x;
  }
}

/// Calls body(std::integral_constant-like tag) for the activation: `body.template
/// operator()<kSilu>()`.
template <typename Body>
[[gnu::always_inline]] inline void dispatch(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone:
      return body.template operator()<Activation::kNone>();
    case Activation::kRelu:
      return body.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return body.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return body.template operator()<Activation::kGeluTanh>();
    case Activation::kQuickGelu:
      return body.template operator()<Activation::kQuickGelu>();
    case Activation::kSilu:
      return body.template operator()<Activation::kSilu>();
    case Activation::kTanh:
      return body.template operator()<Activation::kTanh>();
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
