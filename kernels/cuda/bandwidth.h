#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace moq::kernels::cuda {

/// Reads a buffer on a GPU once: what every "share of the read bandwidth" is measured against. A
/// caller takes the time of several readings, with and without bulk copies, of a buffer several
/// times larger than the L2 cache, or of buffers in turn that are; it is launched as other kernels
/// here are, and reads while kernels ahead end, which must not write the buffer. The memory is the
/// device's, and so is that of `exclusive_or`, to which the exclusive or of all 8-byte words is
/// added: proof that every one of them was read.
/// @param bulk  by bulk copies to shared memory (compute capability 9.0; before it: as without)
/// @throws moq::Error if bytes is zero or not a multiple of 16, if the buffer is not aligned to 16
///         bytes, or if the launch fails.
void read(const void* buffer, std::size_t bytes, bool bulk, std::uint64_t* exclusive_or,
          CUstream_st* stream);

}  // namespace moq::kernels::cuda
