#pragma once

#include <filesystem>

namespace moq::checkpoint {

/// Exchanges the names of two existing directories (or files) of one file system in one step: no
/// other process ever sees one of them missing.
/// @return false, with nothing changed, if the kernel or the file system has no such operation
/// @throws moq::Error naming both for any other failure
bool exchange_paths(const std::filesystem::path& first, const std::filesystem::path& second);

}  // namespace moq::checkpoint
