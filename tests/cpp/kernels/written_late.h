#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/host_copy.h"
#include "tests/cpp/kernels/device.h"

/// What shows whether a kernel waits for those ahead.
namespace moq::kernels::testing {

/// Fills device memory late, by a kernel that others overlap with.
class WrittenLate {
 public:
  WrittenLate(const void* device, std::int64_t bytes)
      : device_(const_cast<void*>(device)), host_(static_cast<std::size_t>(bytes)) {
    MOQ_CUDA_CHECK(cudaMemcpy(host_.data(), device_, size(), cudaMemcpyDeviceToHost));
    MOQ_CUDA_CHECK(cudaMemset(device_, 0xff, size()));  // NaN
  }
  void write() const { cuda::copy_from_host(device_, host_.data(), size(), nullptr); }

 private:
  std::size_t size() const { return host_.elements().size(); }

  void* device_;
  Pinned<std::byte> host_;
};

}  // namespace moq::kernels::testing
