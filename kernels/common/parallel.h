#pragma once

#include <cstdint>

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

/// The number of threads that parallel_for may use on the current thread now: 1 inside a body.
int num_threads();

/// A reference to any callable of two integers; it must outlive the call it is passed to.
class RangeFunction {
 public:
  template <typename Body>
  explicit RangeFunction(const Body& body)
      : body_(&body), call_([](const void* callable, std::int64_t begin, std::int64_t end) {
          (*static_cast<const Body*>(callable))(begin, end);
        }) {}
  void operator()(std::int64_t begin, std::int64_t end) const { call_(body_, begin, end); }

 private:
  const void* body_;
  void (*call_)(const void*, std::int64_t, std::int64_t);
};

/// parallel_for without its template.
void run_parallel(std::int64_t size, std::int64_t grain, RangeFunction body);

/// Calls body(begin, end) on disjoint ranges that cover [0, size), on up to num_threads() threads.
/// Ranges are multiples of `grain` >= 1 but for the last one.
///
/// Threads are workers of one pool a process, made when first needed and shared by all callers: a
/// caller takes the workers that are idle and never waits for one that has not begun. Workers spin
/// for tens of microseconds before they sleep: a decode step makes hundreds of these calls,
/// microseconds apart. A forked child starts with no workers and makes its own.
///
/// An exception thrown by a body is rethrown on the calling thread once every range that had begun
/// has ended; ranges that had not begun are left out. A call from within a body runs on the calling
/// thread alone.
/// @throws moq::Error if grain < 1, and whatever a body throws.
template <typename Body>
void parallel_for(std::int64_t size, std::int64_t grain, const Body& body) {
  run_parallel(size, grain, RangeFunction(body));
}

}  // namespace moq::kernels
