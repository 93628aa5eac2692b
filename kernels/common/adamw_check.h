#pragma once

#include "kernels/adamw.h"
#include "kernels/common/check.h"
#include "kernels/common/visit.h"

namespace moq::kernels {

/// @throws moq::Error
inline void check_adamw(const AdamWArgs& args) {
  for (const AdamWTensor& tensor : args.tensors) {
    MOQ_CHECK(is_float(tensor.parameter_dtype),
              "adamw: parameters must be float32, float16 or bfloat16, got ",
              name_of(tensor.parameter_dtype));
    MOQ_CHECK(tensor.gradient_dtype == tensor.parameter_dtype ||
                  (tensor.parameter_dtype == DType::kFloat32 && is_float(tensor.gradient_dtype)),
              "adamw: the gradient of a ", name_of(tensor.parameter_dtype),
              " parameter must have its dtype, or be float16 or bfloat16 beside float32, got ",
              name_of(tensor.gradient_dtype));
  }
}

}  // namespace moq::kernels
