#include "kernels/adamw.h"

#include "kernels/common/adamw_check.h"
#include "kernels/common/adamw_math.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/adamw.h"

namespace moq::kernels::cpu {
namespace {

/// Elements of a parallel range, below which a second thread does not pay.
constexpr std::int64_t kGrain = 16384;

}  // namespace

void adamw(const AdamWArgs& args) {
  check_adamw(args);
  if (args.found_inf != nullptr && *args.found_inf != 0.0F) {
    return;
  }
  const AdamWStep step = step_of(args);
  for (const AdamWTensor& tensor : args.tensors) {
    const AdamWFactors factors = factors_of(step, *tensor.step);
    parallel_for(tensor.size, kGrain, [&](std::int64_t begin, std::int64_t end) {
      MOQ_DISPATCH_ISA(adamw_elements, tensor, factors, begin, end);
    });
    *tensor.step += 1.0F;
  }
}

}  // namespace moq::kernels::cpu
