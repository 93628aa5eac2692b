#pragma once

#include "kernels/adamw.h"
#include "kernels/common/check.h"
#include "kernels/common/visit.h"

namespace moq::kernels {

/// @throws moq::Error
inline void check_adamw(const AdamWArgs& args) {
  MOQ_CHECK(args.beta1 >= 0.0 && args.beta1 < 1.0 && args.beta2 >= 0.0 && args.beta2 < 1.0,
            "adamw: beta1 and beta2 must be in [0, 1), got ", args.beta1, " and ", args.beta2);
  for (const AdamWTensor& tensor : args.tensors) {
    MOQ_CHECK(is_float(tensor.parameter_dtype),
              "adamw: parameters must be float32, float16 or bfloat16, got ",
              name_of(tensor.parameter_dtype));
    MOQ_CHECK(tensor.gradient_dtype == tensor.parameter_dtype ||
                  (tensor.parameter_dtype == DType::kFloat32 && is_float(tensor.gradient_dtype)),
              "adamw: the gradient of a ", name_of(tensor.parameter_dtype),
              " parameter must have its dtype, or be float16 or bfloat16 beside float32, got ",
              name_of(tensor.gradient_dtype));
    MOQ_CHECK(tensor.size >= 0, "adamw: sizes must be >= 0, got ", tensor.size);
    MOQ_CHECK(tensor.step != nullptr, "adamw: steps must not be null");
    MOQ_CHECK(tensor.size == 0 || (tensor.parameter != nullptr && tensor.gradient != nullptr &&
                                   tensor.exp_avg != nullptr && tensor.exp_avg_sq != nullptr),
              "adamw: parameters, gradients and moments must not be null, got one of ", tensor.size,
              " elements that is");
  }
}

}  // namespace moq::kernels
