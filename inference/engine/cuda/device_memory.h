#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kernels/common/check.h"

namespace moq::inference::cuda {

struct OutOfMemory : Error {
  using Error::Error;
};

/// The end of a message: what would fit into so many bytes.
using FitHint = std::function<std::string(std::int64_t usable)>;

/// Memory of the current device, from torch's allocator, for its current stream.
/// @param what  names the memory in the message: "the KV cache"
/// @param hint  is asked where there is not enough
/// @throws OutOfMemory if there is not enough, saying how much was asked for and how much is free
at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, const char* what,
                    const FitHint& hint = {});
/// The same, of bytes.
at::Tensor allocate(std::int64_t bytes, const char* what, const FitHint& hint = {});

/// Bytes that can still be allocated on the current device, those that torch keeps cached included,
/// within the share of the memory that torch.cuda.set_per_process_memory_fraction leaves.
std::int64_t free_bytes();

/// Of `free` bytes those that large tensors are sure to find: torch's allocator rounds up, and what
/// it keeps free of pieces in use is not to be had.
std::int64_t usable_bytes(std::int64_t free);

/// "about 7 tokens at once would fit, got 9"
/// @param what        "tokens at once"
/// @param unit_bytes  of one
FitHint would_fit(const char* what, std::int64_t count, std::int64_t unit_bytes);

/// "1.5 GiB"
std::string in_units(std::int64_t bytes);

/// Copies host memory to the current device, on its current stream; returns when that is done.
void copy_to_device(std::span<const std::byte> bytes, void* to);

/// A copy of host memory on the current device.
at::Tensor upload(std::span<const std::byte> bytes, const char* what);

template <typename T>
at::Tensor upload(const std::vector<T>& values, const char* what) {
  return upload(std::as_bytes(std::span(values)), what);
}

}  // namespace moq::inference::cuda
