// AdamW of a range of one tensor's elements. The loop is plain for the compiler to vectorise: it
// moves 18 bytes and more an element, which memory delivers more slowly than any instruction set
// computes.
#include "kernels/cpu/simd/adamw.h"

namespace moq::kernels::cpu::MOQ_ISA {

void adamw_elements(const AdamWTensor& tensor, const AdamWFactors& factors, std::int64_t begin,
                    std::int64_t end) {
  visit_adamw(tensor.parameter_dtype, tensor.gradient_dtype,
              [&]<typename Parameter, typename Gradient>(Parameter, Gradient) {
                auto* const __restrict__ parameter = static_cast<Parameter*>(tensor.parameter);
                auto* const __restrict__ exp_avg = static_cast<Parameter*>(tensor.exp_avg);
                auto* const __restrict__ exp_avg_sq = static_cast<Parameter*>(tensor.exp_avg_sq);
                const auto* const __restrict__ gradient =
                    static_cast<const Gradient*>(tensor.gradient);
                const AdamWFactors own = factors;
                for (std::int64_t i = begin; i < end; ++i) {
                  const AdamWElement element = updated(
                      {to_float(parameter[i]), to_float(exp_avg[i]), to_float(exp_avg_sq[i])},
                      to_float(gradient[i]), own);
                  store_float(parameter + i, element.parameter);
                  store_float(exp_avg + i, element.exp_avg);
                  store_float(exp_avg_sq + i, element.exp_avg_sq);
                }
              });
}

}  // namespace moq::kernels::cpu::MOQ_ISA
