#pragma once

#include <string>
#include <vector>

namespace moq::trainer {

/// The bytes of all ranks of a process group that carries CPU tensors, in order of rank.
///
/// All of them must call. What is sent are tensors that Python has never seen: a thread of gloo's
/// may hold the last reference to them when the caller goes on, and would need the interpreter to
/// drop others. Where that exits meanwhile, the process aborts.
/// @throws c10::Error if there is no such group, or if a rank is gone.
std::vector<std::string> all_gather_bytes(const std::string& process_group_name,
                                          const std::string& own);

}  // namespace moq::trainer
