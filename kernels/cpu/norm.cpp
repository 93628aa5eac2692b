#include "kernels/norm.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

namespace moq::kernels::cpu {
namespace {

template <typename Args>
void check(const char* name, const Args& args) {
  MOQ_CHECK(args.num_tokens >= 0, name, ": num_tokens must be >= 0, got ", args.num_tokens);
  MOQ_CHECK(args.hidden_size >= 1, name, ": hidden_size must be >= 1, got ", args.hidden_size);
  MOQ_CHECK(args.sum == nullptr || args.sum != args.output, name,
            ": sum and output must be different memory, got the same");
}

/// Tokens per parallel range: about 4096 elements.
std::int64_t grain(std::int64_t hidden_size) {
  return std::max<std::int64_t>(1, 4096 / hidden_size);
}

/// Calls body(x, output) on each token's row; x is input + residual, in `sum` or in `output`.
template <typename Args, typename Body>
void for_each_row(const Args& args, const Body& body) {
  parallel_for(args.num_tokens, grain(args.hidden_size), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t offset = t * args.hidden_size;
      const float* x = args.input + offset;
      float* output = args.output + offset;
      if (args.residual != nullptr || args.sum != nullptr) {
        float* sum = args.sum != nullptr ? args.sum + offset : output;
        for (std::int64_t j = 0; j < args.hidden_size; ++j) {
          sum[j] = args.residual != nullptr ? x[j] + args.residual[offset + j] : x[j];
        }
        x = sum;
      }
      body(x, output);
    }
  });
}

}  // namespace

void layer_norm(const LayerNormArgs& args) {
  check("layer_norm", args);
  const std::int64_t n = args.hidden_size;
  for_each_row(args, [&](const float* x, float* output) {
    float total = 0.0F;
    for (std::int64_t j = 0; j < n; ++j) {
      total += x[j];
    }
    const float mean = total / static_cast<float>(n);
    float squares = 0.0F;
    for (std::int64_t j = 0; j < n; ++j) {
      squares += (x[j] - mean) * (x[j] - mean);
    }
    const float inverse = 1.0F / std::sqrt(squares / static_cast<float>(n) + args.epsilon);
    for (std::int64_t j = 0; j < n; ++j) {
      output[j] = (x[j] - mean) * inverse * args.weight[j] + (args.bias ? args.bias[j] : 0.0F);
    }
  });
}

void rms_norm(const RmsNormArgs& args) {
  check("rms_norm", args);
  const std::int64_t n = args.hidden_size;
  for_each_row(args, [&](const float* x, float* output) {
    float squares = 0.0F;
    for (std::int64_t j = 0; j < n; ++j) {
      squares += x[j] * x[j];
    }
    const float inverse = 1.0F / std::sqrt(squares / static_cast<float>(n) + args.epsilon);
    for (std::int64_t j = 0; j < n; ++j) {
      output[j] = x[j] * inverse * args.weight[j];
    }
  });
}

}  // namespace moq::kernels::cpu
