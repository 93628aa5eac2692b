#include "kernels/activation.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

namespace moq::kernels::cpu {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr std::int64_t kGrain = 4096;

float apply(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0F ? 0.0F : x;
    case Activation::kGelu:
      return 0.5F * x * std::erfc(-x * 0.70710678F);
    case Activation::kGeluTanh:
      return x / (1.0F + std::exp(-1.5957691F * (x + 0.044715F * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1.0F + std::exp(-1.702F * x));
    case Activation::kSilu:
      return x / (1.0F + std::exp(-x));
    case Activation::kTanh:
      return std::tanh(x);
  }
  return x;
}

}  // namespace

void activation(const ActivationArgs& args) {
  MOQ_CHECK(args.size >= 0, "activation: size must be >= 0, got ", args.size);
  parallel_for(args.size, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      args.output[i] = apply(args.activation, args.input[i]);
    }
  });
}

void gated_activation(const GatedActivationArgs& args) {
  MOQ_CHECK(args.m >= 0 && args.n >= 0, "gated_activation: m and n must be >= 0, got ", args.m,
            " and ", args.n);
  parallel_for(args.m, std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(args.n, 1)),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const float* gate = args.gate_up + i * 2 * args.n;
                   const float* up = gate + args.n;
                   for (std::int64_t j = 0; j < args.n; ++j) {
                     args.output[i * args.n + j] = apply(args.activation, gate[j]) * up[j];
                   }
                 }
               });
}

void softmax(const SoftmaxArgs& args) {
  MOQ_CHECK(args.m >= 0 && args.n >= 0, "softmax: m and n must be >= 0, got ", args.m, " and ",
            args.n);
  parallel_for(args.m, std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(args.n, 1)),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const float* input = args.input + i * args.n;
                   float* output = args.output + i * args.n;
                   float maximum = -std::numeric_limits<float>::infinity();
                   for (std::int64_t j = 0; j < args.n; ++j) {
                     maximum = std::max(maximum, input[j]);
                   }
                   float sum = 0.0F;
                   for (std::int64_t j = 0; j < args.n; ++j) {
                     output[j] = std::exp(input[j] - maximum);
                     sum += output[j];
                   }
                   for (std::int64_t j = 0; j < args.n; ++j) {
                     output[j] /= sum;
                   }
                 }
               });
}

}  // namespace moq::kernels::cpu
