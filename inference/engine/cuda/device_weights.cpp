#include "inference/engine/cuda/device_weights.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "inference/engine/cuda/device_memory.h"
#include "kernels/common/half.h"
#include "kernels/common/parallel.h"
#include "kernels/cuda/cuda_check.h"

namespace moq::inference::cuda {
namespace {

// Rows of a table converted at once, which bounds what loading needs beside the table, and by a
// thread.
constexpr std::int64_t kRowsAtOnce = 4096;
constexpr std::int64_t kRowsOfThread = 64;

/// float32 numbers in the storage of a dtype.
std::vector<std::byte> rounded(std::span<const float> values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  store(values, format_of(dtype), bytes.data());
  return bytes;
}

/// Rows [first, first + count) of a table whose elements lie in memory, as float32.
std::vector<float> read_rows(const Table& table, std::int64_t first, std::int64_t count,
                             std::int64_t cols) {
  if (table.source.has_value()) {
    return table.source->read_values({first, first + count}, {0, cols});
  }
  std::vector<float> values(static_cast<std::size_t>(count * cols));
  const auto convert = [&](const auto* elements, auto to_float) {
    std::transform(elements + first * cols, elements + (first + count) * cols, values.begin(),
                   to_float);
  };
  switch (table.view.dtype) {
    case DType::kFloat16:
      convert(static_cast<const std::uint16_t*>(table.view.data), float16_to_float);
      break;
    case DType::kBFloat16:
      convert(static_cast<const std::uint16_t*>(table.view.data), bfloat16_to_float);
      break;
    default:
      convert(static_cast<const float*>(table.view.data), [](float value) { return value; });
  }
  return values;
}

/// The same rows in the storage of a dtype.
std::vector<std::byte> rounded_rows(const Table& table, std::int64_t first, std::int64_t count,
                                    DType dtype) {
  const std::int64_t row_bytes = table.cols * static_cast<std::int64_t>(size_of(dtype));
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * row_bytes));
  kernels::parallel_for(count, kRowsOfThread, [&](std::int64_t begin, std::int64_t end) {
    store(read_rows(table, first + begin, end - begin, table.cols), format_of(dtype),
          bytes.data() + begin * row_bytes);
  });
  return bytes;
}

}  // namespace

StoredWeight pack_for_cuda(const UnpackedWeight& weight) {
  const auto size = static_cast<std::int64_t>(kernels::cuda::packed_linear_size(weight.shape));
  auto packed = std::make_shared<at::Tensor>(allocate(size, "the weights"));
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor rows = upload(weight.rows, "the weights");
  const at::Tensor scales = upload(weight.scales, "the weights");
  const at::Tensor zero_points = upload(weight.zero_points, "the weights");
  kernels::PackLinearArgs args = weight.view(packed->mutable_data_ptr());
  args.weight = rows.const_data_ptr();
  args.scales = static_cast<const float*>(scales.const_data_ptr());
  args.zero_points = weight.shape.asymmetric
                         ? static_cast<const std::int32_t*>(zero_points.const_data_ptr())
                         : nullptr;
  kernels::cuda::pack_linear(args, stream);
  MOQ_CUDA_CHECK(cudaStreamSynchronize(stream));
  return {.weight = {.shape = weight.shape, .data = packed->const_data_ptr()},
          .storage = packed,
          .bytes = size};
}

DeviceWeights::DeviceWeights(const ModelSpec& spec, const Weights& weights, DType dtype)
    : dtype_(dtype) {
  const auto norm_of = [&](const Norm& values) { return norm(spec, values, spec.norm); };
  token_embedding = table(weights.token_embedding);
  position_embedding = table(weights.position_embedding);
  position_embedding.row_offset = static_cast<std::int32_t>(spec.position_offset);
  token_type_embedding = table(weights.token_type_embedding);
  embedding_norm = norm_of(weights.embedding_norm);
  for (const Layer& layer : weights.layers) {
    layers.push_back({.attention_norm = norm_of(layer.attention_norm),
                      .qkv = projection(layer.qkv),
                      .query_norm = norm(spec, layer.query_norm, kernels::NormKind::kRmsNorm),
                      .key_norm = norm(spec, layer.key_norm, kernels::NormKind::kRmsNorm),
                      .attention_out = projection(layer.attention_out, /*splits_input=*/true),
                      .ffn_norm = norm_of(layer.ffn_norm),
                      .up = projection(layer.up),
                      .down = projection(layer.down, /*splits_input=*/true)});
  }
  link(spec);
  final_norm = spec.norm_place == NormPlace::kPost && !layers.empty() ? layers.back().ffn_norm
                                                                      : norm_of(weights.final_norm);
  head_dense = projection(weights.head_dense);
  head_norm = norm_of(weights.head_norm);
  head = projection(weights.head);
  pooler = projection(weights.pooler);
  classifier = projection(weights.classifier);
}

const float* DeviceWeights::keep(const std::vector<float>& values) {
  return values.empty() ? nullptr
                        : static_cast<const float*>(keep_tensor(upload(values, "the weights")));
}

void* DeviceWeights::keep_tensor(at::Tensor tensor) {
  bytes_ += static_cast<std::int64_t>(tensor.nbytes());
  kept_.push_back(std::move(tensor));
  return kept_.back().mutable_data_ptr();
}

const void* DeviceWeights::keep_rounded(const std::vector<float>& values) {
  return values.empty() ? nullptr : keep_tensor(upload(rounded(values, dtype_), "the weights"));
}

kernels::DeviceNorm DeviceWeights::norm(const ModelSpec& spec, const Norm& norm,
                                        kernels::NormKind kind) {
  if (norm.weight.empty()) {
    return {};
  }
  return {.kind = kind,
          .weight = keep(norm.weight),
          .bias = keep(norm.bias),
          .epsilon = static_cast<float>(spec.norm_epsilon)};
}

void DeviceWeights::link(const ModelSpec& spec) {
  DeviceProjection* last = nullptr;
  for (DeviceLayer& layer : layers) {
    DeviceProjection* const after_qkv[] = {&layer.attention_out, &layer.up, &layer.down};
    DeviceProjection* const parallel[] = {&layer.up, &layer.attention_out, &layer.down};
    if (last != nullptr) {
      last->next = layer.qkv.weight;
    }
    last = &layer.qkv;
    for (DeviceProjection* projection : spec.parallel_residual ? parallel : after_qkv) {
      last->next = projection->weight;
      last = projection;
    }
  }
}

DeviceProjection DeviceWeights::projection(const Linear& linear, bool splits_input) {
  return {.weight = linear.weight(),
          .bias = keep_rounded(linear.bias),
          .input = linear.input,
          .splits_input = splits_input,
          .next = {}};
}

kernels::DeviceEmbeddingLookup DeviceWeights::table(const Table& table) {
  const std::int64_t rows = table.rows();
  if (rows == 0) {
    return {};
  }
  const std::int64_t row_bytes = table.cols * static_cast<std::int64_t>(size_of(dtype_));
  at::Tensor copy = allocate(rows * row_bytes, "the weights");
  auto* const out = static_cast<char*>(copy.mutable_data_ptr());
  if (!table.source.has_value() && table.view.dtype == dtype_) {
    copy_to_device({static_cast<const std::byte*>(table.view.data),
                    static_cast<std::size_t>(rows * row_bytes)},
                   out);
  } else {
    for (std::int64_t first = 0; first < rows; first += kRowsAtOnce) {
      const std::int64_t count = std::min(kRowsAtOnce, rows - first);
      copy_to_device(rounded_rows(table, first, count, dtype_), out + first * row_bytes);
    }
  }
  return {.data = keep_tensor(std::move(copy)), .dtype = dtype_};
}

}  // namespace moq::inference::cuda
