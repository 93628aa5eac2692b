#include "inference/engine/cuda/device_group.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "kernels/common/check.h"

namespace moq::inference::cuda {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

class ProcessGroupDevices final : public DeviceGroup {
 public:
  explicit ProcessGroupDevices(Group group) : group_(std::move(group)) {}

  void all_reduce_sum(at::Tensor& tensor) override { reduce(tensor, c10d::ReduceOp::SUM); }
  void all_reduce_max(at::Tensor& tensor) override { reduce(tensor, c10d::ReduceOp::MAX); }
  void all_gather(at::Tensor& all, at::Tensor& own) override {
    complete("all_gather", [&] { return group_->_allgather_base(all, own); });
  }

 private:
  void reduce(at::Tensor& tensor, c10d::ReduceOp::RedOpType operation) {
    std::vector<at::Tensor> tensors = {tensor};
    complete("all_reduce", [&] {
      return group_->allreduce(tensors, c10d::AllreduceOptions{.reduceOp = operation});
    });
  }

  /// Waiting for a collective of GPUs lets the current stream wait, not this thread.
  template <typename Start>
  void complete(const char* operation, Start start) const {
    try {
      start()->wait();
    } catch (const std::exception& error) {
      moq::detail::fail(operation, ": every rank must take part, got an error on rank ",
                        group_->getRank(), " of ", group_->getSize(), ": ", error.what());
    }
  }

  Group group_;
};

}  // namespace

std::unique_ptr<DeviceGroup> open_device_group(const std::string& process_group_name) {
  return std::make_unique<ProcessGroupDevices>(c10d::resolve_process_group(process_group_name));
}

}  // namespace moq::inference::cuda
