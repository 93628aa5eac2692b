#pragma once

#include <cuda_runtime_api.h>

#include "kernels/common/check.h"

/// Throws moq::Error with the runtime's own words and the place, unless the call succeeded.
#define MOQ_CUDA_CHECK(call)                                                                 \
  do {                                                                                       \
    const cudaError_t moq_cuda_status = (call);                                              \
    MOQ_CHECK(moq_cuda_status == cudaSuccess, "CUDA: ", cudaGetErrorString(moq_cuda_status), \
              " in " #call " at ", __FILE__, ":", __LINE__);                                 \
  } while (false)
