#pragma once

#include <cstddef>

struct CUstream_st;

namespace moq::kernels::cuda {

/// Copies a little to a GPU by a kernel that reads the host's memory itself. In a CUDA graph it
/// lets the kernel behind it begin early, and costs less than a copy by the copy engine does. The
/// host's memory is page-locked. It is read before the kernels ahead in the stream have ended, none
/// of which may write it, and stays as it is until this one has. `to` is the device's.
/// @throws moq::Error if an address or bytes is not a multiple of 16, for a null pointer to
///         something non-empty, for memory of the host that is not page-locked, or if the launch
///         fails.
void copy_from_host(void* to, const void* host, std::size_t bytes, CUstream_st* stream);

}  // namespace moq::kernels::cuda
