// The only file that includes c10d: the transport to ranks on other hosts, and the rendezvous of
// those on one.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <optional>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "inference/parallel/communicator.h"
#include "inference/parallel/communicator_checks.h"
#include "inference/parallel/communicator_local.h"
#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

[[noreturn]] void fail(const Group& group, const char* operation, const char* reason) {
  moq::detail::fail(operation, ": every rank must take part, got an error from ",
                    group->getBackendName(), " on rank ", group->getRank(), " of ",
                    group->getSize(), ": ", reason);
}

/// Runs a collective and waits for it; what c10d throws gets the operation, rank and backend added.
template <typename Start>
void complete(const Group& group, const char* operation, Start start) {
  try {
    start()->wait();
  } catch (const c10::Error& error) {
    fail(group, operation, error.what_without_backtrace());
  } catch (const std::exception& error) {
    fail(group, operation, error.what());
  }
}

void broadcast_bytes(const Group& group, const char* operation, std::span<std::byte> bytes,
                     int root) {
  std::vector<at::Tensor> tensors = {
      at::from_blob(bytes.data(), {static_cast<std::int64_t>(bytes.size())}, at::kByte)};
  complete(group, operation,
           [&] { return group->broadcast(tensors, c10d::BroadcastOptions{.rootRank = root}); });
}

/// Smallest of the ranks' numbers.
std::int64_t minimum(const Group& group, const char* operation, std::int64_t number) {
  std::vector<at::Tensor> tensors = {at::from_blob(&number, {1}, at::kLong)};
  complete(group, operation, [&] {
    return group->allreduce(tensors, c10d::AllreduceOptions{.reduceOp = c10d::ReduceOp::MIN});
  });
  return number;
}

class C10dCommunicator final : public Communicator {
 public:
  explicit C10dCommunicator(Group group) : group_(std::move(group)) {}

  int rank() const override { return group_->getRank(); }
  int size() const override { return group_->getSize(); }
  std::string transport() const override { return group_->getBackendName(); }

  void all_reduce_sum(at::Tensor& tensor) override {
    reduce("all_reduce_sum", tensor, [](at::Tensor& sum, const at::Tensor& next) { sum += next; });
  }

  void all_reduce_max(at::Tensor& tensor) override {
    reduce("all_reduce_max", tensor, [](at::Tensor& maximum, const at::Tensor& next) {
      at::maximum_out(maximum, maximum, next);
    });
  }

  void broadcast(at::Tensor& tensor, int root) override {
    detail::check_contiguous("broadcast", tensor);
    detail::check_root(root, size());
    if (tensor.numel() > 0) {
      broadcast_bytes(group_, "broadcast", detail::bytes_of(tensor), root);
    }
  }

  at::Tensor all_gather_columns(const at::Tensor& shard,
                                std::span<const std::int64_t> widths) override {
    const std::int64_t total = detail::check_columns(shard, widths, rank(), size());
    const std::int64_t widest = *std::max_element(widths.begin(), widths.end());
    const std::int64_t m = shard.size(0);
    at::Tensor joined = at::empty({m, total}, shard.options());  // [m, sum(widths)]
    if (joined.numel() == 0) {
      return joined;
    }
    // c10d gathers equal parts: every shard travels with the width of the widest.
    at::Tensor padded = at::zeros({m, widest}, shard.options());
    padded.narrow(1, 0, shard.size(1)).copy_(shard);
    const at::Tensor shards = all_gather("all_gather_columns", padded);  // [size, m, widest]
    std::int64_t column = 0;
    for (int rank = 0; rank < size(); ++rank) {
      const std::int64_t width = widths[static_cast<std::size_t>(rank)];
      joined.narrow(1, column, width).copy_(shards[rank].narrow(1, 0, width));
      column += width;
    }
    return joined;
  }

  void barrier() override {
    complete(group_, "barrier", [&] { return group_->barrier(); });
  }

 private:
  /// The tensors of all ranks, [size, ...].
  at::Tensor all_gather(const char* operation, const at::Tensor& own) {
    std::vector<std::int64_t> shape(own.sizes().begin(), own.sizes().end());
    shape.insert(shape.begin(), size());
    at::Tensor all = at::empty(shape, own.options());
    at::Tensor part = own.unsqueeze(0);
    complete(group_, operation, [&] { return group_->_allgather_base(all, part); });
    return all;
  }

  /// Gathers and combines in rank order, as the shared-memory transport does. A backend's own
  /// reduction would add in an order of its own, and a model would answer differently on one host
  /// and on two.
  template <typename Combine>
  void reduce(const char* operation, at::Tensor& tensor, Combine combine) {
    detail::check_float32(operation, tensor);
    if (tensor.numel() == 0) {
      return;
    }
    const at::Tensor all = all_gather(operation, tensor);
    tensor.copy_(all[0]);
    for (int rank = 1; rank < size(); ++rank) {
      combine(tensor, all[rank]);
    }
  }

  Group group_;
};

/// What rank 0 tells the others so that they can map its memory.
struct Invitation {
  SharedMemory::Address address;
  std::array<char, 1024> host{};
};

struct Rendezvous {
  std::unique_ptr<SharedMemoryGroup> group;  ///< null if any rank could not join
  std::string problem;                       ///< why not, as far as this rank knows
  bool one_host = true;                      ///< false if this rank is on another host than rank 0
};

/// Lets every rank map one segment of rank 0. All ranks agree on whether it worked for all.
Rendezvous meet_in_shared_memory(const Group& group) {
  const char* const operation = "make_communicator";
  const int rank = group->getRank();
  const int size = group->getSize();
  const SharedMemoryOptions options{
      .timeout = group->getBackend(c10::DeviceType::CPU)->getBackendOptions()->timeout};
  const std::size_t bytes = SharedMemoryGroup::bytes_needed(size, options);

  Rendezvous result;
  std::optional<SharedMemory> memory;
  Invitation invitation;
  const std::string host = shared_memory_host();
  try {
    if (rank == 0) {
      memory.emplace(SharedMemory::create(bytes));
      invitation.address = memory->address();
      host.copy(invitation.host.data(), invitation.host.size() - 1);
    }
  } catch (const Error& error) {
    result.problem = error.what();
  }
  broadcast_bytes(group, operation, std::as_writable_bytes(std::span(&invitation, 1)), 0);
  try {
    result.one_host = rank == 0 || host == invitation.host.data();
    MOQ_CHECK(result.one_host, "shared memory: all ranks must run on one host, got rank 0 on ",
              invitation.host.data(), " and rank ", rank, " on ", host);
    if (rank != 0) {
      memory.emplace(SharedMemory::open(invitation.address, bytes));
    }
    if (memory) {
      result.group = std::make_unique<SharedMemoryGroup>(std::move(*memory), rank, size, options);
    }
  } catch (const Error& error) {
    result.problem = error.what();
  }
  const std::int64_t first_failed = minimum(group, operation, result.problem.empty() ? size : rank);
  if (first_failed < size) {
    result.group.reset();
    if (result.problem.empty()) {
      result.problem = "rank " + std::to_string(first_failed) +
                       " could not map the memory; its own output says why";
    }
  }
  return result;
}

}  // namespace

std::shared_ptr<Communicator> make_communicator(const std::string& process_group_name,
                                                Transport transport) {
  const Group group = c10d::resolve_process_group(process_group_name);
  if (group->getSize() == 1) {
    return single_process();
  }
  if (transport == Transport::kC10d) {
    return std::make_shared<C10dCommunicator>(group);
  }
  Rendezvous rendezvous = meet_in_shared_memory(group);
  if (rendezvous.group) {
    return shared_memory_communicator(std::move(rendezvous.group));
  }
  MOQ_CHECK(transport == Transport::kAuto,
            "make_communicator: every rank must map the shared memory, got: ", rendezvous.problem);
  if (rendezvous.one_host) {
    TORCH_WARN("make_communicator: collectives go through ", group->getBackendName(),
               ", some hundred times slower than shared memory, because ", rendezvous.problem);
  }
  return std::make_shared<C10dCommunicator>(group);
}

}  // namespace moq::inference
