#include "kernels/common/parallel.h"

#include "kernels/common/check.h"

namespace moq::kernels {
namespace {
thread_local int thread_limit = 1;
}

ThreadScope::ThreadScope(int num_threads) : previous_(thread_limit) {
  MOQ_CHECK(num_threads >= 1, "ThreadScope: num_threads must be >= 1, got ", num_threads);
  thread_limit = num_threads;
}

ThreadScope::~ThreadScope() { thread_limit = previous_; }

int num_threads() { return thread_limit; }

void parallel_for(std::int64_t size, std::int64_t /*grain*/,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& body) {
  if (size > 0) {
    body(0, size);
  }
}

}  // namespace moq::kernels
