#include "kernels/activation.h"

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/activation.h"

namespace moq::kernels::cpu {
namespace {

/// Elements per parallel range: below this a second thread costs more than it saves.
constexpr std::int64_t kGrain = 4096;

std::int64_t rows_per_range(std::int64_t n) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, n));
}

template <typename Args>
void check_matrix(const char* name, const Args& args) {
  MOQ_CHECK(args.m >= 0 && args.n >= 0, name, ": m and n must be >= 0, got ", args.m, " and ",
            args.n);
}

}  // namespace

void activation(const ActivationArgs& args) {
  MOQ_CHECK(args.size >= 0, "activation: size must be >= 0, got ", args.size);
  parallel_for(args.size, kGrain, [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(activation_elements, args.activation, args.input + begin, args.output + begin,
                     end - begin);
  });
}

void gated_activation(const GatedActivationArgs& args) {
  check_matrix("gated_activation", args);
  parallel_for(args.m, rows_per_range(args.n), [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(gated_activation_rows, args, begin, end);
  });
}

void softmax(const SoftmaxArgs& args) {
  check_matrix("softmax", args);
  parallel_for(args.m, rows_per_range(args.n), [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(softmax_rows, args, begin, end);
  });
}

}  // namespace moq::kernels::cpu
