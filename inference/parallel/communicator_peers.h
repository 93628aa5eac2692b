#pragma once

#include <array>
#include <span>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "inference/parallel/process.h"

/// Who is behind the ranks of a c10d process group. c10d says of a failed collective that a
/// connection broke, not which rank is gone.
namespace moq::inference {

/// The process of one rank. Plain data, to be sent to the others.
struct Peer {
  Process process;
  std::array<char, 1024> host{};  ///< as shared_memory_host() names it, zero-terminated
};

/// The calling process.
Peer this_peer();

/// Finds the ranks whose absence made a collective fail on this rank, and agrees with the other
/// ranks on the answer through the group's store. Waits up to five seconds for evidence.
/// @param peers  one per rank
/// @returns "rank 1 (process 4711) of 2: its process has ended", or that it gives no answer; empty
///          if every rank is there
std::string find_missing_ranks(c10d::ProcessGroup& group, std::span<const Peer> peers);

}  // namespace moq::inference
