#include "kernels/norm.h"

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/norm.h"

namespace moq::kernels::cpu {
namespace {

template <typename Args>
void check(const char* name, const Args& args) {
  MOQ_CHECK(args.num_tokens >= 0, name, ": num_tokens must be >= 0, got ", args.num_tokens);
  MOQ_CHECK(args.hidden_size >= 1, name, ": hidden_size must be >= 1, got ", args.hidden_size);
  MOQ_CHECK(args.sum == nullptr || args.sum != args.output, name,
            ": sum and output must be different memory, got the same");
}

/// Tokens per parallel range: about 4096 elements, below which a second thread does not pay.
std::int64_t grain(std::int64_t hidden_size) {
  return std::max<std::int64_t>(1, 4096 / hidden_size);
}

}  // namespace

void layer_norm(const LayerNormArgs& args) {
  check("layer_norm", args);
  parallel_for(args.num_tokens, grain(args.hidden_size), [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(layer_norm_rows, args, begin, end);
  });
}

void rms_norm(const RmsNormArgs& args) {
  check("rms_norm", args);
  parallel_for(args.num_tokens, grain(args.hidden_size), [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(rms_norm_rows, args, begin, end);
  });
}

}  // namespace moq::kernels::cpu
