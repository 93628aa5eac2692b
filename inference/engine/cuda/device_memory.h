#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>

namespace moq::inference::cuda {

/// Bytes of memory of the current device, from torch's allocator.
/// @param what  names the memory in the message: "the KV cache"
/// @param hint  ends the message: what would fit
/// @throws moq::Error if there is not enough, saying how much was asked for and how much is free
at::Tensor allocate(std::int64_t bytes, const char* what, const std::string& hint = {});

/// Bytes that can still be allocated on the current device, those that torch keeps cached included.
std::int64_t free_bytes();

/// "1.5 GiB"
std::string in_units(std::int64_t bytes);

/// A copy of host memory on the current device. Returns when the copy is complete.
at::Tensor upload(std::span<const std::byte> bytes, const char* what);

template <typename T>
at::Tensor upload(const std::vector<T>& values, const char* what) {
  return upload(std::as_bytes(std::span(values)), what);
}

}  // namespace moq::inference::cuda
