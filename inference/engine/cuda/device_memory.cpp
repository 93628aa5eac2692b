#include "inference/engine/cuda/device_memory.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/accumulate.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iomanip>
#include <sstream>

#include "kernels/cuda/cuda_check.h"

namespace moq::inference::cuda {
namespace {

/// Bytes of the current device's memory.
struct Room {
  std::int64_t unreserved;  ///< that torch may still ask for
  std::int64_t cached;      ///< that it has and that no tensor uses
};

Room room() {
  std::size_t free = 0;
  std::size_t total = 0;
  MOQ_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  at::globalContext().lazyInitDevice(at::kCUDA);  // else the allocator knows of no device
  const auto device = c10::cuda::current_device();
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device);
  const auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const std::int64_t reserved = stats.reserved_bytes[all].current;
  const double share = std::min(c10::cuda::CUDACachingAllocator::getMemoryFraction(device), 1.0);
  const auto most = static_cast<std::int64_t>(share * static_cast<double>(total)) - reserved;
  return {.unreserved = std::clamp(most, std::int64_t{0}, static_cast<std::int64_t>(free)),
          .cached = reserved - stats.allocated_bytes[all].current};
}

}  // namespace

std::string in_units(std::int64_t bytes) {
  constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; value >= 1024.0 && unit + 1 < kUnits.size(); ++unit) {
    value /= 1024.0;
  }
  std::ostringstream text;
  text << std::fixed << std::setprecision(unit == 0 ? 0 : 2) << value << ' ' << kUnits[unit];
  return text.str();
}

std::int64_t free_bytes() {
  const auto [unreserved, cached] = room();
  return unreserved + cached;
}

std::int64_t usable_bytes(std::int64_t free) {
  constexpr std::int64_t kPieces = 64 << 20;
  // Torch's allocator takes memory in units, and for what is between small and large 20 MiB.
  constexpr std::int64_t kUnit = 2 << 20;
  constexpr std::int64_t kSmall = 1 << 20;
  constexpr std::int64_t kLarge = 10 << 20;
  const std::int64_t usable = (free - std::min(kPieces, free / 16)) / kUnit * kUnit;
  return usable > kLarge ? usable : std::min(usable, kSmall);
}

FitHint would_fit(const char* what, std::int64_t count, std::int64_t unit_bytes) {
  return [=](std::int64_t usable) {
    return "about " + std::to_string(usable / unit_bytes) + " " + what + " would fit, got " +
           std::to_string(count);
  };
}

at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, const char* what,
                    const FitHint& hint) {
  const auto device = c10::cuda::current_device();
  try {
    return at::empty(sizes, at::TensorOptions(type).device(at::kCUDA, device));
  } catch (const c10::OutOfMemoryError&) {
    const auto elements = c10::multiply_integers(sizes);
    const auto bytes = elements * static_cast<std::int64_t>(c10::elementSize(type));
    // Torch has given back what it kept whole: the rest lies in pieces between tensors in use.
    const std::int64_t free = room().unreserved;
    std::ostringstream message;
    message << "engine: " << what
            << " must fit into the memory of cuda:" << static_cast<int>(device) << ", got "
            << in_units(bytes) << " to allocate with " << in_units(free) << " free";
    if (hint) {
      message << ": " << hint(usable_bytes(free));
    }
    throw OutOfMemory(message.str());
  }
}

at::Tensor allocate(std::int64_t bytes, const char* what, const FitHint& hint) {
  return allocate({bytes}, at::kByte, what, hint);
}

void copy_to_device(std::span<const std::byte> bytes, void* to) {
  if (!bytes.empty()) {
    cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    MOQ_CUDA_CHECK(cudaMemcpyAsync(to, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream));
    MOQ_CUDA_CHECK(cudaStreamSynchronize(stream));
  }
}

at::Tensor upload(std::span<const std::byte> bytes, const char* what) {
  at::Tensor copy = allocate(static_cast<std::int64_t>(bytes.size()), what);
  copy_to_device(bytes, copy.mutable_data_ptr());
  return copy;
}

}  // namespace moq::inference::cuda
