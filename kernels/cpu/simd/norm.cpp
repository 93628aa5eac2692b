#include "kernels/cpu/simd/norm.h"

#include "kernels/cpu/simd/float_math.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

/// Sum over `size` elements of term(x), in four interleaved sums: one chain of additions would wait
/// for itself.
template <typename Term>
[[gnu::always_inline]] inline float sum_of(const float* x, std::int64_t size, const Term& term) {
  F32 sums[4]{};
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
    for (int part = 0; part < 4; ++part) {
      sums[part] = term(load(x + i + part * kWidth), sums[part]);
    }
  }
  for (; i + kWidth <= size; i += kWidth) {
    sums[0] = term(load(x + i), sums[0]);
  }
  if (i < size) {
    const I32 inside = lane_numbers() < static_cast<std::int32_t>(size - i);
    sums[0] = inside ? term(load_first(x + i, size - i), sums[0]) : sums[0];
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// A row of x = input + residual: where it lies afterwards.
template <typename Args>
[[gnu::always_inline]] inline const float* add_residual(const Args& args, std::int64_t token) {
  const std::int64_t offset = token * args.hidden_size;
  const float* input = args.input + offset;
  if (args.residual == nullptr && args.sum == nullptr) {
    return input;
  }
  float* sum = (args.sum != nullptr ? args.sum : args.output) + offset;
  if (args.residual == nullptr) {
    map(
        sum, args.hidden_size, [](F32 x) { return x; }, input);
  } else {
    map(
        sum, args.hidden_size, [](F32 x, F32 r) { return x + r; }, input, args.residual + offset);
  }
  return sum;
}

}  // namespace

void layer_norm_rows(const LayerNormArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = args.hidden_size;
  const auto count = static_cast<float>(n);
  for (std::int64_t t = begin; t < end; ++t) {
    const float* x = add_residual(args, t);
    float* output = args.output + t * n;
    const F32 mean =
        broadcast(sum_of(x, n, [](F32 value, F32 sum) { return sum + value; }) / count);
    const float variance = sum_of(x, n,
                                  [&](F32 value, F32 sum) {
                                    const F32 difference = value - mean;
                                    return multiply_add(difference, difference, sum);
                                  }) /
                           count;
    const F32 inverse = broadcast(1.0F / std::sqrt(variance + args.epsilon));
    if (args.bias == nullptr) {
      map(
          output, n, [&](F32 value, F32 weight) { return (value - mean) * inverse * weight; }, x,
          args.weight);
    } else {
      map(
          output, n,
          [&](F32 value, F32 weight, F32 bias) {
            return multiply_add((value - mean) * inverse, weight, bias);
          },
          x, args.weight, args.bias);
    }
  }
}

void rms_norm_rows(const RmsNormArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = args.hidden_size;
  for (std::int64_t t = begin; t < end; ++t) {
    const float* x = add_residual(args, t);
    const float squares =
        sum_of(x, n, [](F32 value, F32 sum) { return multiply_add(value, value, sum); });
    const F32 inverse = broadcast(1.0F / std::sqrt(squares / static_cast<float>(n) + args.epsilon));
    map(
        args.output + t * n, n, [&](F32 value, F32 weight) { return value * inverse * weight; }, x,
        args.weight);
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
