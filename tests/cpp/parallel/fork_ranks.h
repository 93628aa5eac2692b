#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "inference/parallel/shared_memory_group.h"

namespace moq::inference {

/// How one rank's process ended.
struct RankResult {
  std::string error;  ///< what() of the exception that ended its work; empty if none did
  int exit_status = 0;
  int signal = 0;  ///< the signal that killed it, or 0
  pid_t process = 0;
};

/// Runs work(group) in `size` processes, one per rank, and waits for all of them to end.
/// A process that has not ended after `limit_seconds` is killed (SIGALRM), so that a hang is a
/// failure.
inline std::vector<RankResult> fork_ranks(int size, const SharedMemoryOptions& options,
                                          const std::function<void(SharedMemoryGroup&)>& work,
                                          unsigned limit_seconds = 60) {
  const std::size_t bytes = SharedMemoryGroup::bytes_needed(size, options);
  const SharedMemory memory = SharedMemory::create(bytes);
  std::vector<RankResult> results(static_cast<std::size_t>(size));
  std::vector<int> error_pipes;
  for (int rank = 0; rank < size; ++rank) {
    std::array<int, 2> ends{};
    if (pipe(ends.data()) != 0) {
      throw std::runtime_error("fork_ranks: no pipe");
    }
    const pid_t child = fork();
    if (child == 0) {
      close(ends[0]);
      alarm(limit_seconds);
      try {
        SharedMemoryGroup group(SharedMemory::open(memory.address(), bytes), rank, size, options);
        work(group);
      } catch (const std::exception& error) {
        const std::string text = error.what();
        (void)!write(ends[1], text.data(), text.size());
      }
      _exit(0);
    }
    close(ends[1]);
    error_pipes.push_back(ends[0]);
    results[static_cast<std::size_t>(rank)].process = child;
  }
  for (std::size_t rank = 0; rank < results.size(); ++rank) {
    std::array<char, 4096> text{};
    ssize_t length = 0;
    while ((length = read(error_pipes[rank], text.data(), text.size())) > 0) {
      results[rank].error.append(text.data(), static_cast<std::size_t>(length));
    }
    close(error_pipes[rank]);
    int status = 0;
    waitpid(results[rank].process, &status, 0);
    results[rank].exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    results[rank].signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  }
  return results;
}

}  // namespace moq::inference
