#pragma once

/// Marks an inline function that both the host compiler and nvcc's device pass build from the same
/// text. On the host it is always inlined: the files of kernels/cpu/simd/ are compiled once per
/// instruction set, and an out-of-line copy made for AVX-512 could be the one that the linker keeps
/// for every caller, also on a processor without it.
#if defined(__CUDACC__)
#define MOQ_HOST_DEVICE __host__ __device__
#else
#define MOQ_HOST_DEVICE [[gnu::always_inline]]
#endif
