#include "csrc/trainer/gather.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace moq::trainer {

std::vector<std::string> all_gather_bytes(const std::string& process_group_name,
                                          const std::string& own) {
  const auto group = c10d::resolve_process_group(process_group_name);
  const std::int64_t ranks = group->getSize();
  at::Tensor own_size = at::full({1}, static_cast<std::int64_t>(own.size()), at::kLong);
  at::Tensor sizes = at::empty({ranks}, at::kLong);
  group->_allgather_base(sizes, own_size)->wait();

  const auto* size = sizes.const_data_ptr<std::int64_t>();
  const std::int64_t longest = *std::max_element(size, size + ranks);
  at::Tensor padded = at::zeros({1, longest}, at::kByte);
  at::Tensor gathered = at::empty({ranks, longest}, at::kByte);
  std::memcpy(padded.mutable_data_ptr(), own.data(), own.size());
  group->_allgather_base(gathered, padded)->wait();

  std::vector<std::string> result;
  const auto* row = static_cast<const char*>(gathered.const_data_ptr());
  for (std::int64_t rank = 0; rank < ranks; ++rank, row += longest) {
    result.emplace_back(row, static_cast<std::size_t>(size[rank]));
  }
  return result;
}

}  // namespace moq::trainer
