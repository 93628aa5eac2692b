#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace moq::inference::cuda {

/// The GPUs that share one model: collectives of their c10d process group (NCCL), enqueued on the
/// current stream. They may be captured in a CUDA graph. Every rank makes the same calls in the
/// same order; all get the same bits.
class DeviceGroup {
 public:
  virtual ~DeviceGroup() = default;

  /// tensor = sum over ranks, in place.
  virtual void all_reduce_sum(at::Tensor& tensor) = 0;
  /// tensor = elementwise maximum over ranks, in place.
  virtual void all_reduce_max(at::Tensor& tensor) = 0;
  /// all = the tensors of all ranks, [size, ...].
  virtual void all_gather(at::Tensor& all, at::Tensor& own) = 0;
};

/// @param process_group_name  as registered with c10d; must carry GPU tensors
/// @throws moq::Error if there is no such group
std::unique_ptr<DeviceGroup> open_device_group(const std::string& process_group_name);

}  // namespace moq::inference::cuda
