#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/linear.h"

/// What benchmarks of CUDA kernels share.
namespace moq::kernels {

constexpr int kRepeats = 7;

/// Device memory, zeroed.
class Memory {
 public:
  explicit Memory(std::int64_t bytes) {
    MOQ_CUDA_CHECK(cudaMalloc(&data_, static_cast<std::size_t>(bytes)));
    MOQ_CUDA_CHECK(cudaMemset(data_, 0, static_cast<std::size_t>(bytes)));
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Memory() { cudaFree(data_); }

  template <typename Element>
  Element* as() const {
    return static_cast<Element*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// Seconds of what `enqueue` puts into a stream, as one graph: the median of some launches.
inline double time_graph(const std::function<void(cudaStream_t)>& enqueue) {
  cudaStream_t stream = nullptr;
  MOQ_CUDA_CHECK(cudaStreamCreate(&stream));
  MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  enqueue(stream);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  MOQ_CUDA_CHECK(cudaEventCreate(&begin));
  MOQ_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i <= kRepeats; ++i) {
    MOQ_CUDA_CHECK(cudaEventRecord(begin, stream));
    MOQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    MOQ_CUDA_CHECK(cudaEventRecord(end, stream));
    MOQ_CUDA_CHECK(cudaStreamSynchronize(stream));
    float milliseconds = 0.0F;
    MOQ_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i > 0) {  // the first one warms up
      seconds.push_back(milliseconds * 1e-3);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
  return seconds[kRepeats / 2];
}

/// INT8 (one scale a row) or float16 weights, all the same, packed one after the other.
class Weights {
 public:
  Weights(std::int64_t n, std::int64_t k, std::int64_t count,
          WeightFormat format = WeightFormat::kInt8)
      : shape_{.n = n, .k = k, .format = format, .group_size = k},
        bytes_(static_cast<std::int64_t>(cuda::packed_linear_size(shape_)) + 127 & ~127LL),
        packed_(bytes_ * count) {
    const Memory weight(n * k * bits_of(format) / 8);
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0F, 32.0F);
    const auto code = [&] { return std::clamp(std::rint(normal(generator)), -127.0F, 127.0F); };
    if (format == WeightFormat::kInt8) {
      fill<std::int8_t>(weight, n * k, [&] { return static_cast<std::int8_t>(code()); });
    } else {
      fill<Float16>(weight, n * k, [&] { return Float16{float_to_float16(code() / 32768)}; });
    }
    const std::vector<float> host_scales(static_cast<std::size_t>(n), 1.0F / 32768);
    const Memory scales(n * 4);
    MOQ_CUDA_CHECK(cudaMemcpy(scales.as<float>(), host_scales.data(), host_scales.size() * 4,
                              cudaMemcpyHostToDevice));
    for (std::int64_t i = 0; i < count; ++i) {
      cuda::pack_linear({.shape = shape_,
                         .weight = weight.as<void>(),
                         .row_stride = k,
                         .col_stride = 1,
                         .scales = scales.as<float>(),
                         .packed = packed_.as<char>() + i * bytes_},
                        nullptr);
    }
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  }

  std::int64_t bytes() const { return bytes_; }
  PackedLinear at(std::int64_t i) const {
    return {.shape = shape_, .data = packed_.as<char>() + i * bytes_};
  }

 private:
  /// Repeats some numbers until there are `size` of them.
  template <typename Element, typename Draw>
  static void fill(const Memory& memory, std::int64_t size, const Draw& draw) {
    std::vector<Element> pattern(static_cast<std::size_t>(std::min<std::int64_t>(size, 1 << 20)));
    std::generate(pattern.begin(), pattern.end(), draw);
    for (std::int64_t i = 0; i < size; i += std::ssize(pattern)) {
      MOQ_CUDA_CHECK(cudaMemcpy(
          memory.as<Element>() + i, pattern.data(),
          static_cast<std::size_t>(std::min(size - i, std::ssize(pattern))) * sizeof(Element),
          cudaMemcpyHostToDevice));
    }
  }

  LinearShape shape_;
  std::int64_t bytes_;
  Memory packed_;
};

}  // namespace moq::kernels
