#pragma once

#include <cmath>

#include "kernels/adamw.h"
#include "kernels/common/host_device.h"
#include "kernels/common/visit.h"

/// The arithmetic of AdamW, the same on the host and on a device.
namespace moq::kernels {

/// What a call has besides its tensors: read once for each of them.
struct AdamWStep {
  double learning_rate;
  double log_beta1;
  double log_beta2;
  double weight_decay;
  float beta1;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float epsilon;
  float sign;  ///< of the gradient
  const float* learning_rate_tensor;
  const float* grad_scale;
  const float* found_inf;
};

inline AdamWStep step_of(const AdamWArgs& args) {
  return {.learning_rate = args.learning_rate,
          .log_beta1 = std::log(args.beta1),
          .log_beta2 = std::log(args.beta2),
          .weight_decay = args.weight_decay,
          .beta1 = static_cast<float>(args.beta1),
          .beta2 = static_cast<float>(args.beta2),
          .one_minus_beta1 = static_cast<float>(1.0 - args.beta1),
          .one_minus_beta2 = static_cast<float>(1.0 - args.beta2),
          .epsilon = static_cast<float>(args.epsilon),
          .sign = args.maximize ? -1.0F : 1.0F,
          .learning_rate_tensor = args.learning_rate_tensor,
          .grad_scale = args.grad_scale,
          .found_inf = args.found_inf};
}

/// The factors that all elements of a tensor share.
struct AdamWFactors {
  float grad_divisor;
  float decay;
  float beta1;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float step_size;
  float correction;  ///< sqrt(1 - beta2^t)
  float epsilon;
};

MOQ_HOST_DEVICE inline AdamWFactors factors_of(const AdamWStep& step, float completed_steps) {
  const double number = static_cast<double>(completed_steps) + 1.0;
  const double learning_rate = step.learning_rate_tensor != nullptr
                                   ? static_cast<double>(*step.learning_rate_tensor)
                                   : step.learning_rate;
  // 1 - beta^t without the cancellation; beta == 0 has the logarithm -infinity.
  const double correction1 = -expm1(number * step.log_beta1);
  const double correction2 = -expm1(number * step.log_beta2);
  return {
      .grad_divisor = step.sign * (step.grad_scale != nullptr ? *step.grad_scale : 1.0F),
      .decay = static_cast<float>(learning_rate * step.weight_decay),
      .beta1 = step.beta1,
      .beta2 = step.beta2,
      .one_minus_beta1 = step.one_minus_beta1,
      .one_minus_beta2 = step.one_minus_beta2,
      .step_size = static_cast<float>(learning_rate / correction1),
      .correction = static_cast<float>(sqrt(correction2)),
      .epsilon = step.epsilon,
  };
}

/// One element.
struct AdamWElement {
  float parameter;
  float exp_avg;
  float exp_avg_sq;
};

MOQ_HOST_DEVICE inline AdamWElement updated(const AdamWElement& old, float gradient,
                                            const AdamWFactors& factors) {
  const float g = factors.grad_divisor == 1.0F ? gradient : gradient / factors.grad_divisor;
  AdamWElement element;
  element.exp_avg = factors.beta1 * old.exp_avg + factors.one_minus_beta1 * g;
  element.exp_avg_sq = factors.beta2 * old.exp_avg_sq + factors.one_minus_beta2 * g * g;
  const float denominator = sqrtf(element.exp_avg_sq) / factors.correction + factors.epsilon;
  // Without a decay an infinite parameter (a mask) stays: 0 times it would be a NaN.
  const float decayed =
      factors.decay == 0.0F ? old.parameter : old.parameter - factors.decay * old.parameter;
  element.parameter = decayed - factors.step_size * element.exp_avg / denominator;
  return element;
}

/// Calls visitor(element of the parameter, element of the gradient) with the types of checked
/// dtypes.
template <typename Visitor>
void visit_adamw(DType parameter, DType gradient, const Visitor& visitor) {
  if (parameter == DType::kFloat32) {
    visit_float(gradient, [&](auto element) { visitor(float{}, element); });
  } else {
    visit_float(parameter, [&](auto element) { visitor(element, element); });
  }
}

}  // namespace moq::kernels
