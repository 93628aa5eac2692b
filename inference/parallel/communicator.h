#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

/// Collectives of the tensor-parallel engine.
namespace moq::inference {

/// The ranks that share one model, as seen by one of them. Every rank makes the same calls in the
/// same order with the same shapes; a call returns when this rank's result is complete.
///
/// All ranks get the same bits, and the same bits over every transport: sums are taken in rank
/// order. A rank that ends, fails or stays away for the timeout makes the call throw on all others,
/// naming it; after that the communicator is of no use. Not thread-safe: one thread of a rank calls
/// at a time.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// How the ranks reach each other: "none", "shared_memory" or the c10d backend's name ("gloo").
  virtual std::string transport() const = 0;

  /// tensor = sum over ranks, in place. Contiguous CPU float32 of any shape, empty included.
  virtual void all_reduce_sum(at::Tensor& tensor) = 0;

  /// tensor = elementwise maximum over ranks, in place; NaN if any rank has NaN. Contiguous CPU
  /// float32.
  virtual void all_reduce_max(at::Tensor& tensor) = 0;

  /// tensor = the tensor of rank `root`, in place. Contiguous CPU tensor of any dtype.
  virtual void broadcast(at::Tensor& tensor, int root) = 0;

  /// Joins column shards: rank r gives [m, widths[r]], every rank gets [m, sum(widths)], shards in
  /// rank order.
  /// @param shard   contiguous CPU float32
  /// @param widths  one number of columns per rank, 0 allowed, the same on all ranks
  /// @param joined  the result: a tensor of an earlier call keeps its memory where that is enough
  virtual void all_gather_columns_into(const at::Tensor& shard,
                                       std::span<const std::int64_t> widths,
                                       at::Tensor& joined) = 0;

  /// The same into new memory.
  at::Tensor all_gather_columns(const at::Tensor& shard, std::span<const std::int64_t> widths) {
    at::Tensor joined;
    all_gather_columns_into(shard, widths, joined);
    return joined;
  }

  /// Returns when every rank has called it.
  virtual void barrier() = 0;
};

/// The communicator of a process that holds the whole model: size 1, every collective returns its
/// argument's values.
std::shared_ptr<Communicator> single_process();

/// Checks that all ranks pass the same numbers, by one small all-reduce. Ranks that ran different
/// requests would wait for each other in vain or mix their results.
/// @param what  names the numbers in the message: "the prompts"
/// @throws moq::Error on every rank if any rank's numbers differ.
void check_agreement(Communicator& communicator, const char* what,
                     std::span<const std::int64_t> numbers);

/// Runs action(), which may run out of memory on one rank alone, on every rank.
/// @param what  names what action() makes in the message of the others: "the KV cache"
/// @throws  what action() throws; moq::Error where it threw on another rank only
void on_all_ranks(Communicator& communicator, const char* what,
                  const std::function<void()>& action);

/// Which way a communicator takes.
enum class Transport {
  kAuto,          ///< shared memory if all ranks can map it, c10d otherwise
  kSharedMemory,  ///< shared memory, or an error that says why not
  kC10d           ///< the process group's own collectives
};

/// Transport from its name: "auto", "shared_memory", "c10d". @throws moq::Error for another name.
Transport parse_transport(const std::string& name);

/// The communicator of the c10d process group that is registered under `process_group_name` (in
/// Python `group.group_name`), which must carry CPU tensors. Called by all ranks of the group
/// together. A group of one rank gives single_process().
///
/// The group serves the rendezvous: ranks of one host find each other and map one memory segment,
/// which has no name in any file system, so nothing outlives the processes however they end.
/// Waiting for a peer is limited by the group's timeout.
/// @throws moq::Error if there is no such group, or the transport asked for can't be had.
std::shared_ptr<Communicator> make_communicator(const std::string& process_group_name,
                                                Transport transport = Transport::kAuto);

}  // namespace moq::inference
