#pragma once

/// Marks a function that both the host compiler and nvcc's device pass build from the same text.
#if defined(__CUDACC__)
#define MOQ_HOST_DEVICE __host__ __device__
#else
#define MOQ_HOST_DEVICE
#endif
