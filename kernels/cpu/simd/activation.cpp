#include "kernels/cpu/simd/activation.h"

#include "kernels/cpu/simd/float_math.h"

namespace moq::kernels::cpu::MOQ_ISA {

void activation_elements(Activation activation, const float* input, float* output,
                         std::int64_t size) {
  dispatch(activation, [&]<Activation kActivation>() {
    map(
        output, size, [](F32 x) { return activate<kActivation>(x); }, input);
  });
}

void gated_activation_rows(const GatedActivationArgs& args, std::int64_t begin, std::int64_t end) {
  dispatch(args.activation, [&]<Activation kActivation>() {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* gate = args.gate_up + i * 2 * args.n;
      map(
          args.output + i * args.n, args.n,
          [](F32 g, F32 u) { return activate<kActivation>(g) * u; }, gate, gate + args.n);
    }
  });
}

void softmax_rows(const SoftmaxArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float* input = args.input + i * args.n;
    float* output = args.output + i * args.n;
    const float maximum = largest(input, args.n);
    relative_weights(input, output, args.n, maximum, 1.0F);
    F32 sums{};
    for_each_vector(output, args.n, 0.0F, [&](F32 weight) { sums += weight; });
    const F32 sum = broadcast(reduce_add(sums));
    map(
        output, args.n, [&](F32 weight) { return weight / sum; }, output);
  }
}

float largest(const float* scores, std::int64_t size) {
  F32 best = broadcast(-__builtin_inff());
  I32 is_nan{};
  for_each_vector(scores, size, -__builtin_inff(), [&](F32 x) {
    best = maximum(best, x);
    is_nan |= x != x;
  });
  return reduce_max(is_nan & 1) != 0 ? __builtin_nanf("") : reduce_max(best);
}

void relative_weights(const float* scores, float* weights, std::int64_t size, float largest,
                      float temperature) {
  map(
      weights, size, [&](F32 x) { return exponential((x - largest) / temperature); }, scores);
}

}  // namespace moq::kernels::cpu::MOQ_ISA
