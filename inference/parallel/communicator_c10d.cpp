// The transport to ranks on other hosts, and the rendezvous of those on one. This and
// communicator_peers are the only files that include c10d.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "inference/parallel/communicator.h"
#include "inference/parallel/communicator_checks.h"
#include "inference/parallel/communicator_local.h"
#include "inference/parallel/communicator_peers.h"
#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// A process group's collectives, each waited for. An error says which rank is gone.
class Collectives {
 public:
  /// Called by all ranks together: they introduce themselves.
  explicit Collectives(Group group) : group_(std::move(group)) {
    Peer own = this_peer();
    std::vector<Peer> peers(static_cast<std::size_t>(group_->getSize()));
    at::Tensor all = tensor_of(std::as_writable_bytes(std::span(peers)));
    at::Tensor part = tensor_of(std::as_writable_bytes(std::span(&own, 1)));
    complete("make_communicator", [&] { return group_->_allgather_base(all, part); });
    peers_ = std::move(peers);
  }

  int rank() const { return group_->getRank(); }
  int size() const { return group_->getSize(); }
  std::string backend() const { return group_->getBackendName(); }
  std::chrono::milliseconds timeout() const {
    return group_->getBackend(c10::DeviceType::CPU)->getBackendOptions()->timeout;
  }
  const std::vector<Peer>& peers() const { return peers_; }

  void broadcast(const char* operation, std::span<std::byte> bytes, int root) const {
    std::vector<at::Tensor> tensors = {tensor_of(bytes)};
    complete(operation,
             [&] { return group_->broadcast(tensors, c10d::BroadcastOptions{.rootRank = root}); });
  }

  /// The tensors of all ranks, [size, ...].
  at::Tensor all_gather(const char* operation, const at::Tensor& own) const {
    std::vector<std::int64_t> shape(own.sizes().begin(), own.sizes().end());
    shape.insert(shape.begin(), size());
    at::Tensor all = at::empty(shape, own.options());
    at::Tensor part = own.unsqueeze(0);
    complete(operation, [&] { return group_->_allgather_base(all, part); });
    return all;
  }

  /// Smallest of the ranks' numbers.
  std::int64_t minimum(const char* operation, std::int64_t number) const {
    std::vector<at::Tensor> tensors = {at::from_blob(&number, {1}, at::kLong)};
    complete(operation, [&] {
      return group_->allreduce(tensors, c10d::AllreduceOptions{.reduceOp = c10d::ReduceOp::MIN});
    });
    return number;
  }

  void barrier() const {
    complete("barrier", [&] { return group_->barrier(); });
  }

 private:
  static at::Tensor tensor_of(std::span<std::byte> bytes) {
    return at::from_blob(bytes.data(), {static_cast<std::int64_t>(bytes.size())}, at::kByte);
  }

  template <typename Start>
  void complete(const char* operation, Start start) const {
    try {
      start()->wait();
    } catch (const c10::Error& error) {
      fail(operation, error.what_without_backtrace());
    } catch (const std::exception& error) {
      fail(operation, error.what());
    }
  }

  [[noreturn]] void fail(const char* operation, const char* reason) const {
    const std::string missing = peers_.empty() ? "" : find_missing_ranks(*group_, peers_);
    if (!missing.empty()) {
      moq::detail::fail(operation, ": every rank must take part, got no ", missing,
                        "; its own output says why (", backend(), " on rank ", rank(), ": ", reason,
                        ")");
    }
    moq::detail::fail(operation, ": every rank must take part, got an error from ", backend(),
                      " on rank ", rank(), " of ", size(), ": ", reason);
  }

  Group group_;
  std::vector<Peer> peers_;  ///< empty until all have introduced themselves
};

class C10dCommunicator final : public Communicator {
 public:
  explicit C10dCommunicator(Collectives collectives) : collectives_(std::move(collectives)) {}

  int rank() const override { return collectives_.rank(); }
  int size() const override { return collectives_.size(); }
  std::string transport() const override { return collectives_.backend(); }

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
      collectives_.broadcast("broadcast", detail::bytes_of(tensor), root);
    }
  }

  void all_gather_columns_into(const at::Tensor& shard, std::span<const std::int64_t> widths,
                               at::Tensor& joined) override {
    const std::int64_t total = detail::check_columns(shard, widths, rank(), size());
    const std::int64_t widest = *std::max_element(widths.begin(), widths.end());
    const std::int64_t m = shard.size(0);
    detail::shape_result(joined, m, total);
    if (joined.numel() == 0) {
      return;
    }
    // c10d gathers equal parts: every shard travels with the width of the widest.
    at::Tensor padded = at::zeros({m, widest}, shard.options());
    padded.narrow(1, 0, shard.size(1)).copy_(shard);
    // [size, m, widest]
    const at::Tensor shards = collectives_.all_gather("all_gather_columns", padded);
    std::int64_t column = 0;
    for (int rank = 0; rank < size(); ++rank) {
      const std::int64_t width = widths[static_cast<std::size_t>(rank)];
      joined.narrow(1, column, width).copy_(shards[rank].narrow(1, 0, width));
      column += width;
    }
  }

  void barrier() override { collectives_.barrier(); }

 private:
  /// Gathers and combines in rank order, as the shared-memory transport does. A backend's own
  /// reduction would add in an order of its own, and a model would answer differently on one host
  /// and on two.
  template <typename Combine>
  void reduce(const char* operation, at::Tensor& tensor, Combine combine) {
    detail::check_float32(operation, tensor);
    if (tensor.numel() == 0) {
      return;
    }
    const at::Tensor all = collectives_.all_gather(operation, tensor);
    tensor.copy_(all[0]);
    for (int rank = 1; rank < size(); ++rank) {
      combine(tensor, all[rank]);
    }
  }

  Collectives collectives_;
};

struct Rendezvous {
  std::unique_ptr<SharedMemoryGroup> group;  ///< null if any rank could not join
  std::string problem;                       ///< why not, as far as this rank knows
  bool one_host = true;
};

/// Lets every rank map one segment of rank 0. All ranks agree on whether it worked for all.
Rendezvous meet_in_shared_memory(const Collectives& collectives) {
  const char* const operation = "make_communicator";
  const int rank = collectives.rank();
  const int size = collectives.size();
  const SharedMemoryOptions options{.timeout = collectives.timeout()};
  const std::size_t bytes = SharedMemoryGroup::bytes_needed(size, options);

  Rendezvous result;
  const std::vector<Peer>& peers = collectives.peers();
  const auto elsewhere = std::find_if(peers.begin(), peers.end(), [&](const Peer& peer) {
    return peer.host != peers.front().host;
  });
  if (elsewhere != peers.end()) {
    result.one_host = false;
    result.problem = "shared memory: all ranks must run on one host, got rank 0 on " +
                     std::string(peers.front().host.data()) + " and rank " +
                     std::to_string(elsewhere - peers.begin()) + " on " +
                     std::string(elsewhere->host.data());
    return result;
  }
  std::optional<SharedMemory> memory;
  SharedMemory::Address address;
  try {
    if (rank == 0) {
      memory.emplace(SharedMemory::create(bytes));
      address = memory->address();
    }
  } catch (const Error& error) {
    result.problem = error.what();
  }
  collectives.broadcast(operation, std::as_writable_bytes(std::span(&address, 1)), 0);
  try {
    if (rank != 0) {
      memory.emplace(SharedMemory::open(address, bytes));
    }
    if (memory) {
      result.group = std::make_unique<SharedMemoryGroup>(std::move(*memory), rank, size, options);
    }
  } catch (const Error& error) {
    result.problem = error.what();
  }
  const std::int64_t first_failed =
      collectives.minimum(operation, result.problem.empty() ? size : rank);
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
  Collectives collectives(group);
  if (transport == Transport::kC10d) {
    return std::make_shared<C10dCommunicator>(std::move(collectives));
  }
  Rendezvous rendezvous = meet_in_shared_memory(collectives);
  if (rendezvous.group) {
    return shared_memory_communicator(std::move(rendezvous.group));
  }
  MOQ_CHECK(transport == Transport::kAuto,
            "make_communicator: every rank must map the shared memory, got: ", rendezvous.problem);
  if (rendezvous.one_host) {
    TORCH_WARN("make_communicator: collectives go through ", collectives.backend(),
               ", some hundred times slower than shared memory, because ", rendezvous.problem);
  }
  return std::make_shared<C10dCommunicator>(std::move(collectives));
}

}  // namespace moq::inference
