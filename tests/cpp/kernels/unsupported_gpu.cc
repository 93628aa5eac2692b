// check_device of a build for GPUs that this one is not: device.cu is compiled for them alone
// (CMakeLists.txt, where all files *_test.cc make up another program).
#include <gtest/gtest.h>

#include <string>

#include "kernels/common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "tests/cpp/kernels/device.h"

namespace moq::kernels::cuda {
namespace {

TEST(UnsupportedGpuCuda, IsNamedWithTheRemedy) {
  MOQ_SKIP_WITHOUT_GPU();
  cudaDeviceProp properties{};
  MOQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  if (properties.major == MOQ_ONLY_ARCHITECTURE / 10) {
    GTEST_SKIP() << "this GPU is one of those that the build is for";
  }
  const std::string capability =
      std::to_string(properties.major) + "." + std::to_string(properties.minor);
  const std::string architecture = std::to_string(properties.major) +
                                   std::to_string(properties.minor) +
                                   (properties.major == 9 ? "a" : "");
  std::string message;
  try {
    check_device();
  } catch (const Error& error) {
    message = error.what();
  }
  EXPECT_TRUE(message.starts_with("CUDA: the GPU must be one that moq was built for, got " +
                                  std::string(properties.name) + " of compute capability " +
                                  capability + " ("))
      << message;
  EXPECT_TRUE(message.ends_with("): build moq again with MOQ_CUDA_ARCHITECTURES=" + architecture +
                                " (80 is the oldest)"))
      << message;
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);  // it is not met again by the next call
}

}  // namespace
}  // namespace moq::kernels::cuda
