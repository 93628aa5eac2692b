#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "inference/parallel/shared_memory.h"

/// Collectives between processes of one host through memory that all of them map. No torch.
namespace moq::inference {

/// Settings of a SharedMemoryGroup; the same on all ranks.
struct SharedMemoryOptions {
  std::size_t chunk_bytes = 256 * 1024;  ///< longer messages go in chunks of this; a multiple of 64
  std::chrono::milliseconds timeout = std::chrono::minutes(30);  ///< longest wait for a living peer
};

/// The collectives of inference/parallel/communicator.h, on plain memory.
///
/// Each rank owns two buffers in the shared memory, used in turn. A collective is: copy the own
/// chunk into the own buffer, announce it, wait until all ranks have announced theirs, read their
/// buffers. One announcement per chunk is enough: a rank reuses a buffer two collectives later, and
/// that all have announced the one between proves that they are done with reading. An announcement
/// says which call it belongs to, so that ranks that make different calls learn so instead of
/// reading each other's bytes as something else.
///
/// Waiting spins (bounded), then yields, then sleeps in the kernel until the peer's announcement;
/// every few milliseconds of sleep it looks whether the peers still live. All calls throw
/// moq::Error, naming the rank and its process, when a peer's process has ended, its group object
/// was destroyed, or it did not come within the timeout, and naming two ranks with their calls when
/// those differ; every later call throws the same error.
class SharedMemoryGroup {
 public:
  /// Bytes of SharedMemory that a group of `size` ranks needs.
  /// @throws moq::Error if size < 1 or options.chunk_bytes is not a positive multiple of 64.
  static std::size_t bytes_needed(int size, const SharedMemoryOptions& options);

  /// Joins as `rank`. `memory` is one segment of bytes_needed(size, options), mapped by all ranks.
  SharedMemoryGroup(SharedMemory memory, int rank, int size, const SharedMemoryOptions& options);

  /// Leaves: peers that still wait for this rank get an error.
  ~SharedMemoryGroup();
  SharedMemoryGroup(const SharedMemoryGroup&) = delete;
  SharedMemoryGroup& operator=(const SharedMemoryGroup&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  /// values = sum over ranks, in rank order: the same bits on every rank.
  void all_reduce_sum(std::span<float> values);

  /// values = maximum over ranks; NaN where any rank has NaN.
  void all_reduce_max(std::span<float> values);

  /// bytes = those of rank `root`.
  void broadcast(std::span<std::byte> bytes, int root);

  /// Joins column shards in rank order.
  /// @param shard   [rows, widths[rank]], row-major
  /// @param widths  [size], the same on all ranks
  /// @param output  [rows, sum(widths)], row-major, written
  void all_gather_columns(const float* shard, std::int64_t rows,
                          std::span<const std::int64_t> widths, float* output);

  /// Returns when all ranks have called it.
  void barrier();

 private:
  struct Header;
  struct RankControl;
  enum class Failure : std::uint32_t;
  enum class Operation : std::uint32_t {
    kAllReduceSum,
    kAllReduceMax,
    kBroadcast,
    kAllGatherColumns,
    kBarrier
  };
  /// What must be the same on all ranks.
  struct Call {
    Operation operation = Operation::kBarrier;
    std::uint32_t detail = 0;  ///< the root of a broadcast, the rows of a gather
    std::uint64_t bytes = 0;   ///< of the result
    bool operator==(const Call&) const = default;
  };
  static const char* name_of(Operation operation);
  static std::string describe(const Call& call);

  Header& header() const;
  RankControl& control(int rank) const;
  /// The buffer of `rank` that the current collective uses.
  std::byte* buffer(int rank) const;
  void start(const Call& call);
  /// Announces the next chunk, and returns when every rank has announced it.
  void exchange();
  void check_calls();
  void wait_for(int peer);
  void sleep_until_arrived(int peer);
  void check_peers();
  bool has_arrived(int peer) const;
  void report_failure(int peer, Failure failure);
  void throw_if_failed() const;
  template <typename Combine>
  void all_reduce(std::span<float> values, Combine combine);

  SharedMemory memory_;
  int rank_;
  int size_;
  SharedMemoryOptions options_;
  std::chrono::microseconds spin_;  ///< how long a wait stays out of the kernel
  std::uint32_t sequence_ = 0;      ///< announcements made so far, modulo 2^32
  std::uint32_t turn_ = 0;          ///< which of the two buffers is in use
  Call call_;                       ///< the collective in progress
};

}  // namespace moq::inference
