// A caller offers its job to idle workers through their mailboxes, works on it itself, takes back
// the offers that nobody accepted, and waits for the workers that did accept. Ranges are drawn from
// one counter, so a slow or late worker delays nobody by more than one range.
#include "kernels/common/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"

namespace moq::kernels {
namespace {

thread_local int thread_limit = 1;
thread_local bool inside_body = false;

constexpr int kMaxWorkers = 255;
/// Ranges a thread gets on average: enough to even out threads of unequal speed, few enough that
/// drawing them costs nothing.
constexpr std::int64_t kRangesPerThread = 4;
constexpr auto kSpinTime = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/// Spins until `done` holds or kSpinTime has passed; says which.
template <typename Condition>
bool spin_until(const Condition& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) {
        return true;
      }
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

/// Marks the current thread as inside a body for the lifetime of the object.
class BodyScope {
 public:
  BodyScope() : previous_(std::exchange(inside_body, true)) {}
  ~BodyScope() { inside_body = previous_; }
  BodyScope(const BodyScope&) = delete;
  BodyScope& operator=(const BodyScope&) = delete;

 private:
  bool previous_;
};

class Job {
 public:
  Job(std::int64_t size, std::int64_t range, RangeFunction body)
      : size_(size), range_(range), body_(body) {}

  /// Draws ranges until none is left.
  void work() {
    const BodyScope scope;
    try {
      for (;;) {
        const std::int64_t begin = next_.fetch_add(range_, std::memory_order_relaxed);
        if (begin >= size_) {
          break;
        }
        body_(begin, std::min(begin + range_, size_));
      }
    } catch (...) {
      next_.store(size_, std::memory_order_relaxed);
      if (!failed_.exchange(true)) {
        error_ = std::current_exception();
      }
    }
  }

  /// The last thing a worker does with a job: the caller may destroy it from then on.
  void leave() { left_.fetch_add(1, std::memory_order_release); }

  void wait_for(int workers) const {
    const auto all_left = [&] { return left_.load(std::memory_order_acquire) == workers; };
    while (!spin_until(all_left)) {
      std::this_thread::yield();
    }
  }

  void rethrow() const {
    if (error_ != nullptr) {
      std::rethrow_exception(error_);
    }
  }

 private:
  const std::int64_t size_;
  const std::int64_t range_;
  const RangeFunction body_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by the thread that set failed_, read after all have left
};

class Worker {
 public:
  Worker() {
    std::thread([this] { run(); }).detach();
  }

  /// Offers a job; false if the worker is not idle.
  bool offer(Job* job) {
    Job* idle = nullptr;
    if (!mailbox_.compare_exchange_strong(idle, job)) {
      return false;
    }
    // Both this load and the store of mailbox_ are sequentially consistent, as are their
    // counterparts in run(): either the worker sees the job before it sleeps, or this sees it
    // asleep.
    if (asleep_.load()) {
      const std::scoped_lock lock(mutex_);
      wake_.notify_one();
    }
    return true;
  }

  /// Takes an offer back; false if the worker has accepted it.
  bool withdraw(Job* job) { return mailbox_.compare_exchange_strong(job, nullptr); }

 private:
  [[noreturn]] void run() {
    const auto has_job = [this] { return mailbox_.load() != nullptr; };
    for (;;) {
      if (!spin_until(has_job)) {
        std::unique_lock lock(mutex_);
        asleep_.store(true);
        wake_.wait(lock, has_job);
        asleep_.store(false);
      }
      Job* job = mailbox_.load();
      if (job != nullptr && mailbox_.compare_exchange_strong(job, accepted())) {
        job->work();
        mailbox_.store(nullptr);
        job->leave();
      }
    }
  }

  /// Fills the mailbox while the worker works: no job has this address.
  Job* accepted() { return reinterpret_cast<Job*>(this); }

  std::atomic<Job*> mailbox_{nullptr};
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  /// Has up to `count` workers and the calling thread do the job.
  void run(Job& job, int count) {
    grow(count);
    std::array<Worker*, kMaxWorkers> offered;
    int num_offered = 0;
    const int size = size_.load(std::memory_order_acquire);
    for (int i = 0; i < size && num_offered < count; ++i) {
      if (workers_[i]->offer(&job)) {
        offered[num_offered++] = workers_[i].get();
      }
    }
    job.work();
    int accepted = 0;
    for (int i = 0; i < num_offered; ++i) {
      accepted += offered[i]->withdraw(&job) ? 0 : 1;
    }
    job.wait_for(accepted);
  }

 private:
  void grow(int count) {
    if (size_.load(std::memory_order_acquire) >= count) {
      return;
    }
    const std::scoped_lock lock(growing_);
    while (size_.load(std::memory_order_relaxed) < count) {
      workers_[size_.load(std::memory_order_relaxed)] = std::make_unique<Worker>();
      size_.fetch_add(1, std::memory_order_release);
    }
  }

  std::mutex growing_;
  std::atomic<int> size_{0};
  std::array<std::unique_ptr<Worker>, kMaxWorkers> workers_;
};

std::atomic<Pool*> current_pool{nullptr};

/// A forked child has none of the parent's threads and no use for their locks: it forgets the pool.
/// Registered while the library loads, so that no lock of ours is held by another thread then.
const int fork_handler_status =
    pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });

/// The process's pool. It is never destroyed: at exit its workers may still be spinning.
Pool& pool() {
  Pool* pool = current_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    MOQ_CHECK(fork_handler_status == 0, "parallel_for: pthread_atfork must succeed, got status ",
              fork_handler_status);
    auto created = std::make_unique<Pool>();
    if (current_pool.compare_exchange_strong(pool, created.get())) {
      pool = created.release();
    }
  }
  return *pool;
}

}  // namespace

ThreadScope::ThreadScope(int num_threads) : previous_(thread_limit) {
  MOQ_CHECK(num_threads >= 1, "ThreadScope: num_threads must be >= 1, got ", num_threads);
  thread_limit = num_threads;
}

ThreadScope::~ThreadScope() {
  thread_limit = previous_;
}

int num_threads() {
  return inside_body ? 1 : thread_limit;
}

void run_parallel(std::int64_t size, std::int64_t grain, RangeFunction body) {
  MOQ_CHECK(grain >= 1, "parallel_for: grain must be >= 1, got ", grain);
  if (size <= 0) {
    return;
  }
  const std::int64_t units = divide_up(size, grain);
  const auto threads = std::min<std::int64_t>({num_threads(), units, kMaxWorkers + 1});
  if (threads == 1) {
    const BodyScope scope;
    body(0, size);
    return;
  }
  const std::int64_t ranges = std::min(units, threads * kRangesPerThread);
  Job job(size, divide_up(units, ranges) * grain, body);
  pool().run(job, static_cast<int>(threads) - 1);
  job.rethrow();
}

}  // namespace moq::kernels
