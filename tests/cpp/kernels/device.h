#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if defined(MOQ_WITH_CUDA)
#include <cuda_runtime_api.h>

#include "kernels/cuda/cuda_check.h"

#define MOQ_SKIP_WITHOUT_GPU()                                                   \
  do {                                                                           \
    int device_count = 0;                                                        \
    if (cudaGetDeviceCount(&device_count) != cudaSuccess || device_count == 0) { \
      GTEST_SKIP() << "no CUDA device here: the CUDA kernels were not tested";   \
    }                                                                            \
  } while (false)
#else
#define MOQ_SKIP_WITHOUT_GPU() \
  GTEST_SKIP() << "built without CUDA (MOQ_CUDA): the CUDA kernels were not tested"
#endif

/// Ends a test as skipped, saying so, where there is no such device.
#define MOQ_SKIP_WITHOUT(DEVICE)                              \
  do {                                                        \
    if ((DEVICE) == ::moq::kernels::testing::Device::kCuda) { \
      MOQ_SKIP_WITHOUT_GPU();                                 \
    }                                                         \
  } while (false)

/// Where the body runs that a test is about, and memory that it can read.
namespace moq::kernels::testing {

/// How often a test repeats a launch: `times`, or one in MOQ_TEST_REPEATS_DIVISOR of them, for
/// racecheck, under which a launch takes a hundred times longer.
inline int repeats(int times) {
  const char* const divisor = std::getenv("MOQ_TEST_REPEATS_DIVISOR");
  return divisor == nullptr ? times : std::max(times / std::max(std::atoi(divisor), 1), 1);
}

enum class Device { kCpu, kCuda };

inline const auto kDevices = ::testing::Values(Device::kCpu, Device::kCuda);

inline std::string name_of(Device device) {
  return device == Device::kCpu ? "cpu" : "cuda";
}

#if defined(MOQ_WITH_CUDA)

/// Device memory. Starts as a copy of host bytes.
class Buffer {
 public:
  Buffer(const void* host, std::size_t bytes) : Buffer(bytes) {
    MOQ_CUDA_CHECK(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice));
  }
  template <typename Element>
  explicit Buffer(const std::vector<Element>& host)
      : Buffer(host.data(), host.size() * sizeof(Element)) {}
  explicit Buffer(std::size_t bytes) : bytes_(bytes) {
    MOQ_CUDA_CHECK(cudaMalloc(&data_, bytes + 1));  // + 1: an empty one has an address too
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }

  template <typename Element>
  Element* as() const {
    return static_cast<Element*>(data_);
  }
  void* data() const { return data_; }

  template <typename Element>
  void copy_to(std::vector<Element>& host) const {
    MOQ_CUDA_CHECK(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

/// Page-locked memory of the host.
template <typename Element>
class Pinned {
 public:
  explicit Pinned(std::size_t count) {
    MOQ_CUDA_CHECK(cudaMallocHost(&data_, count * sizeof(Element)));
    elements_ = {static_cast<Element*>(data_), count};
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() { cudaFreeHost(data_); }

  std::span<Element> elements() const { return elements_; }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::span<Element> elements_;
};

/// What `enqueue` puts into a stream, captured.
class CapturedGraph {
 public:
  template <typename Enqueue>
  explicit CapturedGraph(const Enqueue& enqueue) {
    MOQ_CUDA_CHECK(cudaStreamCreate(&stream_));
    MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    enqueue(stream_);
    MOQ_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph_));
    MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;
  ~CapturedGraph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  void launch() const { launch(stream_); }
  void launch(cudaStream_t stream) const { MOQ_CUDA_CHECK(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

#endif

/// The numbers of a host vector in a device's memory.
template <typename Element>
class OnDevice {
 public:
  OnDevice([[maybe_unused]] Device device, std::vector<Element> host)
      : host_(std::move(host)), data_(host_.data()) {
#if defined(MOQ_WITH_CUDA)
    if (device == Device::kCuda) {
      buffer_.emplace(host_);
      data_ = buffer_->template as<Element>();
    }
#endif
  }
  OnDevice(const OnDevice&) = delete;

  Element* data() const {
    return data_;
  }

  /// What the memory holds now.
  std::vector<Element> read() const {
    std::vector<Element> result = host_;
#if defined(MOQ_WITH_CUDA)
    if (buffer_.has_value()) {
      buffer_->copy_to(result);
    }
#endif
    return result;
  }

 private:
  std::vector<Element> host_;
  Element* data_;
#if defined(MOQ_WITH_CUDA)
  std::optional<Buffer> buffer_;
#endif
};

}  // namespace moq::kernels::testing
