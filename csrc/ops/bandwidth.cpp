// moq::read_bandwidth, moq::read_once: what the benchmarks hold weight streaming against.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/in_place.h"
#include "kernels/cpu/bandwidth.h"

#if defined(MOQ_WITH_CUDA)
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/zeros.h>

#include "kernels/cuda/bandwidth.h"
#endif

namespace moq::ops {
namespace {

using at::Tensor;

constexpr const char* kName = "read_bandwidth";
constexpr const char* kOnce = "read_once";

void check_read_once(const Tensor& buffer, const Tensor& exclusive_or) {
  check_contiguous(kOnce, "buffer", buffer);
  check_tensor(kOnce, "exclusive_or", exclusive_or, at::kLong, buffer.device(), {1});
}

double read_bandwidth_cpu(const Tensor& buffer, bool prefetch) {
  check_contiguous(kName, "buffer", buffer);
  const kernels::ThreadScope scope(at::get_num_threads());
  const std::span bytes(static_cast<const std::byte*>(buffer.const_data_ptr()), buffer.nbytes());
  return kernels::cpu::measure_read(bytes, prefetch).bytes_per_second;
}

#if defined(MOQ_WITH_CUDA)
double read_bandwidth_cuda(const Tensor& buffer, bool prefetch) {
  check_contiguous(kName, "buffer", buffer);
  const c10::cuda::CUDAGuard guard(buffer.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor found = at::zeros({1}, buffer.options().dtype(at::kLong));
  at::cuda::CUDAEvent begin(cudaEventDefault);
  at::cuda::CUDAEvent end(cudaEventDefault);
  begin.record(stream);
  kernels::cuda::read(buffer.const_data_ptr(), buffer.nbytes(), prefetch,
                      static_cast<std::uint64_t*>(found.mutable_data_ptr()), stream.stream());
  end.record(stream);
  end.synchronize();
  return static_cast<double>(buffer.nbytes()) / (begin.elapsed_time(end) * 1e-3);
}

void read_once_cuda(const Tensor& buffer, const Tensor& exclusive_or, bool prefetch) {
  check_read_once(buffer, exclusive_or);
  const c10::cuda::CUDAGuard guard(buffer.device());
  kernels::cuda::read(buffer.const_data_ptr(), buffer.nbytes(), prefetch,
                      static_cast<std::uint64_t*>(exclusive_or.mutable_data_ptr()),
                      c10::cuda::getCurrentCUDAStream().stream());
}
#endif

void read_once_meta(const Tensor& buffer, const Tensor& exclusive_or, bool /*prefetch*/) {
  check_read_once(buffer, exclusive_or);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, read_bandwidth_cpu);
}

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kOnce, read_once_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kOnce, torch::CppFunction::makeFromBoxedFunction<without_gradient_in_place>());
}

TORCH_LIBRARY_IMPL(moq, ADInplaceOrView, m) {
  m.impl(kOnce, torch::CppFunction::makeFromBoxedFunction<bump_versions>());
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, read_bandwidth_cuda);
  m.impl(kOnce, read_once_cuda);
}
#endif

}  // namespace moq::ops
