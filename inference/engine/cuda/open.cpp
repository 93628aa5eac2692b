// How a checkpoint becomes a transformer on a GPU.
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <memory>
#include <string>
#include <utility>

#include "inference/engine/cuda/decode_step.h"
#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/outside_captures.h"
#include "inference/engine/cuda/transformer.h"
#include "inference/engine/weight_source.h"
#include "kernels/attention.h"
#include "kernels/common/check.h"
#include "kernels/cuda/device.h"
#include "kernels/linear.h"

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

DType compute_dtype_of(const ParameterMap& parameters, const CudaOptions& options,
                       WeightDtype dtype) {
  return options.compute_dtype.has_value() ? parse_compute_dtype(*options.compute_dtype)
                                           : default_compute_dtype(parameters, dtype);
}

/// Device memory that the tables and projections of a rank would take.
std::int64_t bytes_of(const Weights& outline, DType dtype) {
  std::int64_t bytes = 0;
  for_each_linear(outline, [&](const Linear& linear) {
    bytes += static_cast<std::int64_t>(kernels::cuda::packed_linear_size(linear.shape()));
  });
  for (const Table* table :
       {&outline.token_embedding, &outline.position_embedding, &outline.token_type_embedding}) {
    bytes += table->rows() * table->cols * static_cast<std::int64_t>(size_of(dtype));
  }
  return bytes;
}

/// What a model that did not fit into `free` bytes takes, and what of it would: the end of a
/// message.
std::string describe_what_fits(const ParameterMap& parameters, const checkpoint::Checkpoint& files,
                               const LoadOptions& load, const CudaOptions& options,
                               std::int64_t free) {
  const auto bytes_as = [&](WeightDtype dtype, int rank, int size) {
    LoadOptions as = load;
    as.dtype = dtype;
    as.rank = rank;
    as.size = size;
    return bytes_of(outline_weights(parameters, files, as),
                    compute_dtype_of(parameters, options, dtype));
  };
  const auto fits = [&](WeightDtype dtype, int size) {
    for (int rank = 0; rank < size; ++rank) {
      if (bytes_as(dtype, rank, size) >= cuda::usable_bytes(free)) {
        return false;
      }
    }
    return true;
  };
  const std::int64_t asked = bytes_as(load.dtype, 0, 1);
  const std::int64_t as_int8 = bytes_as(WeightDtype::kInt8, 0, 1);
  std::string words = "the model takes about " + cuda::in_units(asked);
  if (load.size > 1) {
    words += ", on " + std::to_string(load.size) + " GPUs together";
  }
  words += ", and " + cuda::in_units(free) + " of this one were free at first";
  if (as_int8 < asked * 3 / 4 && fits(WeightDtype::kInt8, load.size)) {
    words += "; dtype=\"int8\" would fit, with about " + cuda::in_units(as_int8);
  }
  int gpus = load.size + 1;
  while (gpus <= parameters.spec().num_heads && !fits(load.dtype, gpus)) {
    ++gpus;
  }
  if (gpus <= parameters.spec().num_heads) {
    const std::string count = std::to_string(gpus);
    words +=
        "; " + count + " GPUs with as much free would (torchrun --nproc-per-node " + count + ")";
  }
  return words;
}

at::Device check_device(at::Device device) {
  MOQ_CHECK(c10::cuda::device_count() > 0, "engine: device cuda needs a GPU and its driver, got ",
            "none: leave the device out to compute on the CPU (`moq doctor` says what was found)");
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
  MOQ_CHECK(parameters.spec().head_dim <= kernels::cuda::kMaxHeadDim,
            "engine: head_dim must be <= ", kernels::cuda::kMaxHeadDim, " on a GPU, got ",
            parameters.spec().head_dim, ": device=\"cpu\" has no such limit");
  const DType dtype = compute_dtype_of(parameters, options, load.dtype);
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
  const std::int64_t free = cuda::free_bytes();
  std::unique_ptr<cuda::CudaTransformer> transformer;
  try {
    on_all_ranks(*communicator, "the weights", [&] {
      Weights weights = load_weights(parameters, files, load);
      transformer = std::make_unique<cuda::CudaTransformer>(
          parameters.spec(), std::move(weights), communicator,
          communicator->size() > 1 ? cuda::open_device_group(options.group_name) : nullptr, device,
          dtype, cache_dtype);
    });
  } catch (const cuda::OutOfMemory& error) {
    moq::detail::fail(error.what(), ": ",
                      describe_what_fits(parameters, *files, load, options, free));
  }
  return transformer;
}

}  // namespace moq::inference
