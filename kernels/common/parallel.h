#pragma once

#include <cstdint>
#include <functional>

namespace moq::kernels {

/// Limits the kernels that the current thread calls to `num_threads` threads, the calling thread
/// included, for the lifetime of the object. Ops and the engine open one with torch's own thread
/// count on entry, so that moq and torch never want more threads together than torch alone.
/// Without a scope kernels run on one thread.
class ThreadScope {
 public:
  /// @throws moq::Error if num_threads < 1.
  explicit ThreadScope(int num_threads);
  ~ThreadScope();
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  int previous_;
};

/// The number of threads that parallel_for may use on the current thread now.
int num_threads();

/// Calls body(begin, end) on disjoint ranges that cover [0, size), on up to num_threads() threads.
/// Ranges are multiples of `grain` but for the last one. Workers spin briefly before they sleep: a
/// decode step makes hundreds of these calls, microseconds apart.
/// An exception thrown by a body is rethrown on the calling thread after all ranges have ended.
/// A call from within a body runs on the calling thread alone.
void parallel_for(std::int64_t size, std::int64_t grain,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& body);

}  // namespace moq::kernels
