#include "inference/parallel/shared_memory_group.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <numeric>
#include <string>
#include <utility>

#include "inference/parallel/process.h"
#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using Clock = std::chrono::steady_clock;

/// A sleeping rank looks this often whether its peers still live.
constexpr std::chrono::milliseconds kLifeCheckInterval(20);

/// Waits of a decode step last about as long as the ranks' loads differ, tens to hundreds of
/// microseconds. Spinning alone answers fastest; but with a peer that waits for this very processor
/// every further microsecond is lost, so the rest of the time offers the processor to others.
constexpr std::chrono::microseconds kSpin(4);
constexpr std::chrono::microseconds kYield(500);

void pause_processor() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::uint32_t* word_of(std::atomic<std::uint32_t>& value) {
  static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));
  return reinterpret_cast<std::uint32_t*>(&value);
}

/// Sleeps until `value` is no longer `expected` and someone calls futex_wake, or the interval is
/// over.
void futex_wait(std::atomic<std::uint32_t>& value, std::uint32_t expected,
                std::chrono::nanoseconds interval) {
  const timespec timeout{.tv_sec = static_cast<time_t>(interval.count() / 1'000'000'000),
                         .tv_nsec = static_cast<long>(interval.count() % 1'000'000'000)};
  syscall(SYS_futex, word_of(value), FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void futex_wake(std::atomic<std::uint32_t>& value) {
  syscall(SYS_futex, word_of(value), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int usable_processors() {
  cpu_set_t processors;
  CPU_ZERO(&processors);
  return sched_getaffinity(0, sizeof(processors), &processors) == 0 ? CPU_COUNT(&processors) : 1;
}

}  // namespace

enum class SharedMemoryGroup::Failure : std::uint32_t { kEnded = 1, kLeft, kLate, kDiverged };

/// What the ranks share beside the buffers.
struct SharedMemoryGroup::Header {
  /// 0, or the first failure that any rank saw: failing rank in the low 16 bits, Failure above.
  /// First one wins, so that every rank names the rank that failed, not the one that gave up
  /// because of it.
  std::atomic<std::uint32_t> failure;
};

/// One per rank, written by that rank alone but for `sleepers`. 128 bytes, because processors fetch
/// cache lines in pairs, and two ranks' announcements must not share what is fetched. The calls lie
/// in the cache line of `arrived`: who has seen the announcement has them at no further cost.
struct alignas(128) SharedMemoryGroup::RankControl {
  std::atomic<std::uint32_t> arrived;   ///< sequence number of the latest announcement
  std::atomic<std::uint32_t> sleepers;  ///< peers asleep on `arrived`
  std::atomic<std::uint32_t> left;      ///< 1 once the group object is gone
  std::atomic<std::int32_t> process;    ///< 0 until the rank has joined
  std::uint64_t start_time;             ///< of the process; valid once `process` is set
  /// What the latest two announcements belong to, by sequence number: a slower rank may still read
  /// the one before the latest.
  std::array<Call, 2> calls;
};

std::size_t SharedMemoryGroup::bytes_needed(int size, const SharedMemoryOptions& options) {
  MOQ_CHECK(size >= 1 && size <= 0xffff, "SharedMemoryGroup: size must be in [1, 65535], got ",
            size);
  MOQ_CHECK(options.chunk_bytes >= 64 && options.chunk_bytes % 64 == 0,
            "SharedMemoryGroup: chunk_bytes must be a positive multiple of 64, got ",
            options.chunk_bytes);
  static_assert(sizeof(Header) <= sizeof(RankControl));
  static_assert(offsetof(RankControl, calls) + sizeof(RankControl::calls) <= 64);
  const auto ranks = static_cast<std::size_t>(size);
  return (ranks + 1) * sizeof(RankControl) + ranks * 2 * options.chunk_bytes;
}

SharedMemoryGroup::SharedMemoryGroup(SharedMemory memory, int rank, int size,
                                     const SharedMemoryOptions& options)
    : memory_(std::move(memory)), rank_(rank), size_(size), options_(options) {
  MOQ_CHECK(rank >= 0 && rank < size, "SharedMemoryGroup: rank must be in [0, size), got rank ",
            rank, " of size ", size);
  // More ranks than processors: the peer can't run while this rank spins.
  spin_ = usable_processors() >= size ? kSpin : std::chrono::microseconds(0);
  for (turn_ = 0; turn_ < 2; ++turn_) {
    // The first touch places the pages in this rank's memory, and finds now, not later, that there
    // are none.
    std::memset(buffer(rank_), 0, options_.chunk_bytes);
  }
  turn_ = 0;
  RankControl& own = control(rank_);
  const Process self = this_process();
  own.start_time = self.start_time;
  own.process.store(self.id, std::memory_order_release);
}

SharedMemoryGroup::~SharedMemoryGroup() {
  RankControl& own = control(rank_);
  if (own.process.load(std::memory_order_relaxed) == getpid()) {  // not in a forked child's copy
    own.left.store(1, std::memory_order_seq_cst);
    futex_wake(own.arrived);
  }
}

SharedMemoryGroup::Header& SharedMemoryGroup::header() const {
  return *reinterpret_cast<Header*>(memory_.data());
}

SharedMemoryGroup::RankControl& SharedMemoryGroup::control(int rank) const {
  return reinterpret_cast<RankControl*>(memory_.data())[1 + rank];
}

std::byte* SharedMemoryGroup::buffer(int rank) const {
  std::byte* const first =
      memory_.data() + (static_cast<std::size_t>(size_) + 1) * sizeof(RankControl);
  return first + (2 * static_cast<std::size_t>(rank) + turn_) * options_.chunk_bytes;
}

const char* SharedMemoryGroup::name_of(Operation operation) {
  switch (operation) {
    case Operation::kAllReduceSum:
      return "all_reduce_sum";
    case Operation::kAllReduceMax:
      return "all_reduce_max";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kAllGatherColumns:
      return "all_gather_columns";
    case Operation::kBarrier:
      return "barrier";
  }
  return "unknown";  // memory of another version of this class
}

std::string SharedMemoryGroup::describe(const Call& call) {
  std::string text = name_of(call.operation);
  if (call.operation != Operation::kBarrier) {
    text += " of " + std::to_string(call.bytes) + " bytes";
  }
  if (call.operation == Operation::kBroadcast) {
    text += " from rank " + std::to_string(call.detail);
  }
  if (call.operation == Operation::kAllGatherColumns) {
    text += " in " + std::to_string(call.detail) + " rows";
  }
  return text;
}

void SharedMemoryGroup::start(const Call& call) {
  call_ = call;
  throw_if_failed();
}

void SharedMemoryGroup::exchange() {
  RankControl& own = control(rank_);
  ++sequence_;
  own.calls[sequence_ % 2] = call_;
  // Sequentially consistent against the sleeper's increment: either this rank sees the sleeper, or
  // the sleeper sees the announcement before it goes to sleep.
  own.arrived.store(sequence_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) {
    futex_wake(own.arrived);
  }
  for (int step = 1; step < size_; ++step) {
    wait_for((rank_ + step) % size_);
  }
  check_calls();
}

void SharedMemoryGroup::check_calls() {
  // Compared with rank 0's on every rank, so that all name the same two ranks.
  const Call& first = control(0).calls[sequence_ % 2];
  for (int rank = 1; rank < size_; ++rank) {
    if (control(rank).calls[sequence_ % 2] != first) [[unlikely]] {
      report_failure(rank, Failure::kDiverged);
      throw_if_failed();
    }
  }
}

bool SharedMemoryGroup::has_arrived(int peer) const {
  // The difference is right across the wrap at 2^32, because ranks are never two announcements
  // apart.
  const std::uint32_t arrived = control(peer).arrived.load(std::memory_order_acquire);
  return static_cast<std::int32_t>(arrived - sequence_) >= 0;
}

void SharedMemoryGroup::wait_for(int peer) {
  if (has_arrived(peer)) {
    return;
  }
  const Clock::time_point start = Clock::now();
  while (Clock::now() - start < spin_) {
    for (int round = 0; round < 16; ++round) {
      if (has_arrived(peer)) {
        return;
      }
      pause_processor();
    }
  }
  while (Clock::now() - start < kYield) {
    if (has_arrived(peer)) {
      return;
    }
    sched_yield();
  }
  sleep_until_arrived(peer);
}

void SharedMemoryGroup::sleep_until_arrived(int peer) {
  RankControl& theirs = control(peer);
  const Clock::time_point deadline = Clock::now() + options_.timeout;
  theirs.sleepers.fetch_add(1, std::memory_order_seq_cst);
  while (true) {
    const std::uint32_t seen = theirs.arrived.load(std::memory_order_seq_cst);
    if (has_arrived(peer)) {
      break;
    }
    check_peers();
    if (Clock::now() >= deadline) {
      report_failure(peer, Failure::kLate);
    }
    if (header().failure.load(std::memory_order_acquire) != 0) {
      theirs.sleepers.fetch_sub(1, std::memory_order_relaxed);
      throw_if_failed();
    }
    futex_wait(theirs.arrived, seen, kLifeCheckInterval);
  }
  theirs.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void SharedMemoryGroup::check_peers() {
  for (int peer = 0; peer < size_; ++peer) {
    RankControl& theirs = control(peer);
    const std::int32_t process = theirs.process.load(std::memory_order_acquire);
    if (peer == rank_ || process == 0) {
      continue;
    }
    const bool left = theirs.left.load(std::memory_order_acquire) != 0;
    const bool ended = !left && !is_alive({process, theirs.start_time});
    // A peer may go once it has announced the last collective; that it has is looked at after its
    // end was seen.
    if ((left || ended) && !has_arrived(peer)) {
      report_failure(peer, left ? Failure::kLeft : Failure::kEnded);
      return;
    }
  }
}

void SharedMemoryGroup::report_failure(int peer, Failure failure) {
  std::uint32_t none = 0;
  const auto code = static_cast<std::uint32_t>(failure) << 16 | static_cast<std::uint32_t>(peer);
  header().failure.compare_exchange_strong(none, code, std::memory_order_acq_rel);
}

void SharedMemoryGroup::throw_if_failed() const {
  const std::uint32_t code = header().failure.load(std::memory_order_acquire);
  if (code == 0) [[likely]] {
    return;
  }
  const auto peer = static_cast<int>(code & 0xffff);
  const auto failure = static_cast<Failure>(code >> 16);
  if (failure == Failure::kDiverged) {
    // Nobody went on, so both calls are still there to be read.
    const auto call_of = [&](int rank) { return describe(control(rank).calls[sequence_ % 2]); };
    detail::fail(name_of(call_.operation), ": all ", size_,
                 " ranks must make the same calls in the same order, got ", call_of(0),
                 " on rank 0 and ", call_of(peer), " on rank ", peer);
  }
  const std::string what =
      failure == Failure::kEnded ? "its process has ended"
      : failure == Failure::kLeft
          ? "it has left the group"
          : "it did not come within " + std::to_string(options_.timeout.count()) + " ms";
  detail::fail(name_of(call_.operation), ": every rank must take part, got no rank ", peer,
               " (process ", control(peer).process.load(), ") of ", size_, ": ", what,
               "; its own output says why");
}

template <typename Combine>
void SharedMemoryGroup::all_reduce(std::span<float> values, Combine combine) {
  // Combined in blocks that stay in the first-level cache while the ranks' contributions are added
  // one by one.
  constexpr std::size_t kBlock = 2048;
  if (values.empty()) {
    return exchange();
  }
  const std::size_t chunk = options_.chunk_bytes / sizeof(float);
  for (; !values.empty(); values = values.subspan(std::min(chunk, values.size()))) {
    const std::span<float> piece = values.first(std::min(chunk, values.size()));
    turn_ ^= 1;
    std::memcpy(buffer(rank_), piece.data(), piece.size_bytes());
    exchange();
    for (std::size_t begin = 0; begin < piece.size(); begin += kBlock) {
      const std::size_t count = std::min(kBlock, piece.size() - begin);
      float* __restrict const result = piece.data() + begin;
      const auto contribution = [&](int rank) {
        return reinterpret_cast<const float*>(buffer(rank)) + begin;
      };
      std::memcpy(result, contribution(0), count * sizeof(float));
      for (int rank = 1; rank < size_; ++rank) {
        const float* __restrict const theirs = contribution(rank);
        for (std::size_t i = 0; i < count; ++i) {
          result[i] = combine(result[i], theirs[i]);
        }
      }
    }
  }
}

void SharedMemoryGroup::all_reduce_sum(std::span<float> values) {
  start({.operation = Operation::kAllReduceSum, .bytes = values.size_bytes()});
  all_reduce(values, [](float a, float b) { return a + b; });
}

void SharedMemoryGroup::all_reduce_max(std::span<float> values) {
  start({.operation = Operation::kAllReduceMax, .bytes = values.size_bytes()});
  all_reduce(values, [](float a, float b) { return a > b || a != a ? a : b; });
}

void SharedMemoryGroup::broadcast(std::span<std::byte> bytes, int root) {
  MOQ_CHECK(root >= 0 && root < size_, "broadcast: root must be in [0, ", size_, "), got ", root);
  start({.operation = Operation::kBroadcast,
         .detail = static_cast<std::uint32_t>(root),
         .bytes = bytes.size()});
  if (bytes.empty()) {
    return exchange();
  }
  for (; !bytes.empty(); bytes = bytes.subspan(std::min(options_.chunk_bytes, bytes.size()))) {
    const std::span<std::byte> piece = bytes.first(std::min(options_.chunk_bytes, bytes.size()));
    turn_ ^= 1;
    if (rank_ == root) {
      std::memcpy(buffer(rank_), piece.data(), piece.size());
    }
    exchange();
    if (rank_ != root) {
      std::memcpy(piece.data(), buffer(root), piece.size());
    }
  }
}

void SharedMemoryGroup::all_gather_columns(const float* shard, std::int64_t rows,
                                           std::span<const std::int64_t> widths, float* output) {
  MOQ_CHECK(widths.size() == static_cast<std::size_t>(size_) &&
                std::all_of(widths.begin(), widths.end(), [](auto width) { return width >= 0; }),
            "all_gather_columns: widths must be one number >= 0 per rank, got ", widths.size(),
            " numbers for ", size_, " ranks");
  const std::int64_t total = std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
  const std::int64_t widest = *std::max_element(widths.begin(), widths.end());
  start({.operation = Operation::kAllGatherColumns,
         .detail = static_cast<std::uint32_t>(rows),
         .bytes = static_cast<std::uint64_t>(rows * total) * sizeof(float)});
  if (rows == 0 || widest == 0) {
    return exchange();
  }
  // A chunk holds as many whole rows of the widest shard as fit, or a part of one row.
  const auto chunk = static_cast<std::int64_t>(options_.chunk_bytes / sizeof(float));
  const std::int64_t columns_at_once = std::clamp<std::int64_t>(widest, 1, chunk);
  const std::int64_t rows_at_once = chunk / columns_at_once;

  for (std::int64_t row = 0; row < rows; row += rows_at_once) {
    const std::int64_t num_rows = std::min(rows_at_once, rows - row);
    for (std::int64_t column = 0; column < widest; column += columns_at_once) {
      const auto columns_of = [&](int rank) {
        const std::int64_t width = widths[static_cast<std::size_t>(rank)];
        return std::clamp<std::int64_t>(width - column, 0, columns_at_once);
      };
      const auto copy_rows = [&](int rank, const float* from, std::int64_t from_stride, float* to,
                                 std::int64_t to_stride) {
        for (std::int64_t r = 0; r < num_rows; ++r) {
          std::copy_n(from + r * from_stride, columns_of(rank), to + r * to_stride);
        }
      };
      const std::int64_t own_width = widths[static_cast<std::size_t>(rank_)];
      turn_ ^= 1;
      copy_rows(rank_, shard + row * own_width + column, own_width,
                reinterpret_cast<float*>(buffer(rank_)), columns_of(rank_));
      exchange();
      std::int64_t first_column = 0;
      for (int rank = 0; rank < size_; ++rank) {
        copy_rows(rank, reinterpret_cast<const float*>(buffer(rank)), columns_of(rank),
                  output + row * total + first_column + column, total);
        first_column += widths[static_cast<std::size_t>(rank)];
      }
    }
  }
}

void SharedMemoryGroup::barrier() {
  start({.operation = Operation::kBarrier});
  exchange();
}

}  // namespace moq::inference
