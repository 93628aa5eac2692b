#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "inference/checkpoint/safetensors.h"

/// Tensors of torch in safetensors files.
namespace moq::exporter {

/// A copy, on the CPU, of a tensor whose bytes in a file are `bytes`.
/// @throws moq::Error naming the tensor, if torch has no such dtype
at::Tensor copy_tensor(const checkpoint::TensorInfo& info, std::span<const std::byte> bytes);

/// Copies of all tensors of one file, by name.
/// @throws moq::Error as checkpoint::SafetensorsFile::open and copy_tensor
std::map<std::string, at::Tensor> read_safetensors(const std::filesystem::path& path);

/// Writes tensors, on any device and with any strides, as one file and flushes it to the disk.
/// One tensor at a time is copied to the CPU.
/// @param metadata  as for checkpoint::SafetensorsWriter
/// @throws moq::Error naming the tensor, if files have no such dtype; moq::Error as
///     checkpoint::SafetensorsWriter
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace moq::exporter
