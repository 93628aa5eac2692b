#pragma once

#include <cstdint>

namespace moq::inference {

/// A process of this host. The kernel gives a number to a new process once the old one is gone;
/// number and start time together are unique while the host is up.
struct Process {
  std::int32_t id = 0;
  std::uint64_t start_time = 0;  ///< clock ticks since the host started
};

/// The calling process.
Process this_process();

/// Whether `process` can still run: false once it has ended, also before its parent has taken note
/// of it. True if the system doesn't tell (out of file descriptors, say).
bool is_alive(const Process& process);

}  // namespace moq::inference
