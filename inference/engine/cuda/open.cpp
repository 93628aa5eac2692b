// How a checkpoint becomes a transformer on a GPU.
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <string>
#include <utility>

#include "inference/engine/cuda/decode_step.h"
#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/outside_captures.h"
#include "inference/engine/cuda/transformer.h"
#include "inference/engine/weight_source.h"
#include "kernels/common/check.h"
#include "kernels/cuda/device.h"

namespace moq::inference {
namespace {

DType parse_compute_dtype(const std::string& name) {
  if (name == "fp16") {
    return DType::kFloat16;
  }
  if (name == "fp32") {
    return DType::kFloat32;
  }
  MOQ_CHECK(name == "bf16", "engine: compute_dtype must be fp32, fp16 or bf16, got ", name);
  return DType::kBFloat16;
}

/// What activations are kept in if the caller does not say: as float weights, or beside integers
/// as the checkpoint's floats, of which float32 becomes float16.
DType default_compute_dtype(const ParameterMap& parameters, WeightDtype dtype) {
  switch (dtype) {
    case WeightDtype::kFloat32:
      return DType::kFloat32;
    case WeightDtype::kFloat16:
      return DType::kFloat16;
    case WeightDtype::kBFloat16:
      return DType::kBFloat16;
    default:
      break;
  }
  const WeightSource& layer = *parameters.at(Module::kDown, 0).matrix;
  const WeightSource& table = *parameters.at(Module::kTokenEmbedding).matrix;
  if (dtype == WeightDtype::kAsStored && !layer.quantized()) {
    return layer.dtype();
  }
  return table.dtype() == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

/// Bytes of a checkpoint's tensors: as they are stored, or with its floats as INT8.
std::int64_t bytes_of(const checkpoint::Checkpoint& files, bool as_int8) {
  std::int64_t bytes = 0;
  for (const std::string& name : files.names()) {
    const auto stored = static_cast<std::int64_t>(files.bytes(name).size());
    const std::optional<DType> dtype = float_dtype(files.at(name).dtype);
    bytes +=
        as_int8 && dtype.has_value() ? stored / static_cast<std::int64_t>(size_of(*dtype)) : stored;
  }
  return bytes;
}

/// What would fit of a model that does not, as the end of a message.
std::string describe_what_fits(const checkpoint::Checkpoint& files, WeightDtype dtype,
                               std::int64_t free) {
  constexpr std::int64_t kMostGpus = 64;
  const std::int64_t stored_bytes = bytes_of(files, /*as_int8=*/false);
  const std::int64_t int8_bytes = bytes_of(files, /*as_int8=*/true);
  const bool is_int8 = dtype == WeightDtype::kInt8;
  std::string words;
  if (!is_int8 && int8_bytes < std::min(free, stored_bytes * 3 / 4)) {
    words += "; dtype=\"int8\" would fit, with about " + cuda::in_units(int8_bytes);
  }
  const std::int64_t bytes = is_int8 ? int8_bytes : stored_bytes;
  const std::int64_t gpus = free > 0 ? bytes / free + 1 : kMostGpus + 1;
  if (gpus > 1 && gpus <= kMostGpus) {
    const std::string count = std::to_string(gpus);
    words +=
        "; " + count + " GPUs with as much free would (torchrun --nproc-per-node " + count + ")";
  }
  return words;
}

at::Device check_device(at::Device device) {
  MOQ_CHECK(c10::cuda::device_count() > 0, "engine: device cuda needs a GPU and its driver, got ",
            "none: `moq doctor` says what was found");
  const c10::DeviceIndex index = device.has_index() ? device.index() : c10::cuda::current_device();
  const at::Device found(at::kCUDA, index);
  MOQ_CHECK(index < c10::cuda::device_count(), "engine: device must be one of the ",
            std::to_string(c10::cuda::device_count()), " GPUs, got ", found.str());
  return found;
}

}  // namespace

std::unique_ptr<Transformer> open_cuda_transformer(
    const ParameterMap& parameters, const std::shared_ptr<const checkpoint::Checkpoint>& files,
    LoadOptions load, const CudaOptions& options,
    const std::shared_ptr<Communicator>& communicator) {
  const at::Device device = check_device(options.device);
  const c10::cuda::CUDAGuard guard(device);
  const cuda::OutsideCaptures outside(device);
  kernels::cuda::check_device();
  const DType dtype = options.compute_dtype.has_value()
                          ? parse_compute_dtype(*options.compute_dtype)
                          : default_compute_dtype(parameters, load.dtype);
  const std::string kv_dtype = options.kv_cache_dtype.value_or("int8");
  MOQ_CHECK(kv_dtype == "int8", "engine: kv_cache_dtype must be None or int8, got ", kv_dtype);
  MOQ_CHECK(communicator->size() == 1 || !options.group_name.empty(),
            "engine: several ranks on GPUs need a process group with NCCL, got none");
  const DType cache_dtype = options.kv_cache_dtype.has_value() ? DType::kInt8 : dtype;
  cuda::check_decode_step({.spec = parameters.spec(),
                           .dtype = dtype,
                           .kv_dtype = cache_dtype,
                           .ranks = communicator->size()},
                          parameters, load);
  load.pack = cuda::pack_for_cuda;
  load.pair_rows = true;
  const int ranks = communicator->size();
  const std::int64_t free = cuda::free_bytes();
  try {
    Weights weights = load_weights(parameters, files, load);
    return std::make_unique<cuda::CudaTransformer>(
        parameters.spec(), std::move(weights), communicator,
        ranks > 1 ? cuda::open_device_group(options.group_name) : nullptr, device, dtype,
        cache_dtype);
  } catch (const cuda::OutOfMemory& error) {
    moq::detail::fail(
        error.what(), ": the model takes ", cuda::in_units(bytes_of(*files, /*as_int8=*/false)),
        " as it is stored, for ", ranks, " GPUs together, and ", cuda::in_units(free),
        " of this one were free at first", describe_what_fits(*files, load.dtype, free));
  }
}

}  // namespace moq::inference
