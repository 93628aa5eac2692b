/// Times `linear` on a GPU with weights that no cache holds, INT8 (one scale a row) or float16, in
/// CUDA graphs: single shapes as a share of the read bandwidth, measured in the same run, and the
/// linear layers of whole models in their order, each waiting for the one before. Prints Markdown
/// tables.
///
///   moq_linear_bench [shapes | layers] [int8 | float16]      one of the two, or both
///
/// Build with MOQ_BUILD_BENCHMARKS=ON and CUDA.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/linear.h"
#include "tests/benchmarks/cuda_bench.h"

namespace moq::kernels {
namespace {

constexpr std::int64_t kColdBytes = 1 << 30;  // over sixteen times the L2 cache

__global__ void __launch_bounds__(512) read_all(const uint4* data, std::int64_t size, uint4* out) {
  constexpr int kUnroll = 8;
  uint4 sum{};
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i + (kUnroll - 1) * threads < size; i += kUnroll * threads) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const uint4 value = __ldcs(data + i + j * threads);
      sum.x ^= value.x ^ value.y ^ value.z ^ value.w;
    }
  }
  if (sum.x == 0x12345678U) {
    *out = sum;
  }
}

/// Bytes a second of reading memory and doing nothing with it.
double read_bandwidth() {
  constexpr std::int64_t kBytes = std::int64_t{2} << 30;
  const Memory memory(kBytes);
  int multiprocessors = 0;
  MOQ_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, /*device=*/0));
  double best = 0.0;
  for (const int blocks : {2, 4, 8}) {
    const double seconds = time_graph([&](cudaStream_t stream) {
      read_all<<<blocks * multiprocessors, 512, 0, stream>>>(memory.as<uint4>(), kBytes / 16,
                                                             memory.as<uint4>());
    });
    best = std::max(best, kBytes / seconds);
  }
  return best;
}

// ------------------------------------------------------------------------------------ one shape

constexpr std::int64_t kTokens[] = {1, 2, 8, 16, 32, 64};

void time_shapes(WeightFormat format, double bandwidth) {
  constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {
      {49152, 12288}, {12768, 4256}, {4256, 4256},  {17024, 4256}, {4256, 17024}, {6144, 4096},
      {4096, 4096},   {28672, 4096}, {4096, 14336}, {4800, 1600},  {1600, 1600},  {6400, 1600},
      {1600, 6400},   {3072, 1024},  {1024, 1024},  {4096, 1024},  {1024, 4096}};
  std::printf("\nTB/s of %s weights (share of the read bandwidth), by tokens\n\n| n x k |",
              name_of(format));
  for (const std::int64_t m : kTokens) {
    std::printf(" %ld |", static_cast<long>(m));
  }
  std::printf("\n|---|---|---|---|---|---|---|\n");
  for (const auto& [n, k] : kShapes) {
    const std::int64_t count =
        std::max<std::int64_t>(2, kColdBytes / (n * k * bits_of(format) / 8) + 1);
    const Weights weights(n, k, count, format);
    const Memory input(kTokens[std::size(kTokens) - 1] * k * 2);
    const Memory output(kTokens[std::size(kTokens) - 1] * n * 2);
    std::printf("| %ldx%ld |", static_cast<long>(n), static_cast<long>(k));
    for (const std::int64_t m : kTokens) {
      const double seconds = time_graph([&](cudaStream_t stream) {
        for (std::int64_t i = 0; i < count; ++i) {
          cuda::linear({.input = input.as<void>(),
                        .m = m,
                        .input_stride = k,
                        .weight = weights.at(i),
                        .output = output.as<void>(),
                        .output_stride = n,
                        .weight_is_ready = true},
                       stream);
        }
      });
      const double rate = static_cast<double>(weights.bytes() * count) / seconds;
      std::printf(" %.2f (%.0f %%) |", rate * 1e-12, 100 * rate / bandwidth);
    }
    std::printf("\n");
  }
}

// -------------------------------------------------------------------------------- whole models

struct Model {
  const char* name;
  std::int64_t hidden;
  std::int64_t intermediate;
  std::int64_t layers;
  std::int32_t heads;
  std::int32_t kv_heads;
  std::int32_t head_dim;
  bool gated;  ///< and rotated, with RMS norms, as in Llama; else as in GPT-2
};

constexpr Model kModels[] = {{"GPT-2 XL", 1600, 6400, 48, 25, 25, 64, false},
                             {"17B", 4256, 17024, 12, 56, 56, 76, false},
                             {"Llama-3 8B", 4096, 14336, 16, 32, 8, 128, true},
                             {"BERT large", 1024, 4096, 24, 16, 16, 64, false}};

/// The linear layers of a model for m tokens; attention passes its query on.
void time_model(const Model& model, WeightFormat format, double bandwidth) {
  const std::int64_t queries = model.heads * model.head_dim;
  const std::int64_t qkv_rows = queries + 2 * model.kv_heads * model.head_dim;
  const std::int64_t up_rows = model.intermediate * (model.gated ? 2 : 1);
  const Weights qkv(qkv_rows, model.hidden, model.layers, format);
  const Weights out(model.hidden, queries, model.layers, format);
  const Weights up(up_rows, model.hidden, model.layers, format);
  const Weights down(model.hidden, model.intermediate, model.layers, format);
  const std::int64_t bytes = qkv.bytes() + out.bytes() + up.bytes() + down.bytes();
  constexpr std::int64_t kMost = kTokens[std::size(kTokens) - 1];
  const Memory states(kMost * model.hidden * 2);
  const Memory projected(kMost * qkv_rows * 2);
  const Memory between(kMost * up_rows * 2);
  const Memory norm_weight(std::max(up_rows, model.hidden) * 4);
  const Memory bias(std::max(up_rows, qkv_rows) * 2);
  const Memory pages(2 * kPageTokens * model.kv_heads * model.head_dim * 2);
  const Memory table(kMost * 4 + model.head_dim * 4);
  const DeviceRotary rotary{.rotary_dim = model.head_dim,
                            .positions = table.as<std::int32_t>(),
                            .cos = table.as<float>() + kMost,
                            .sin = table.as<float>() + kMost};
  std::printf("| %s | %.1f |", model.name, static_cast<double>(bytes) / bandwidth * 1e6);
  for (const std::int64_t m : kTokens) {
    const DeviceNorm norm = {
        .kind = !cuda::linear_takes_norm(m) ? NormKind::kNone
                : model.gated               ? NormKind::kRmsNorm
                                            : NormKind::kLayerNorm,
        .weight = norm_weight.as<float>(),
        .bias = cuda::linear_takes_norm(m) && !model.gated ? norm_weight.as<float>() : nullptr,
        .epsilon = 1e-5F};
    const void* own_bias = model.gated ? nullptr : bias.as<void>();
    const double seconds = time_graph([&](cudaStream_t stream) {
      for (std::int64_t i = 0; i < model.layers; ++i) {
        cuda::linear({.input = states.as<void>(),
                      .m = m,
                      .input_stride = model.hidden,
                      .weight = qkv.at(i),
                      .bias = own_bias,
                      .output = projected.as<void>(),
                      .output_stride = qkv_rows,
                      .norm = norm,
                      .qkv = {.head_dim = model.head_dim,
                              .num_heads = model.heads,
                              .num_kv_heads = model.kv_heads,
                              .rotary = model.gated ? rotary : DeviceRotary{},
                              .pages = {.keys = pages.as<void>(),
                                        .values = pages.as<char>() + kPageTokens * model.kv_heads *
                                                                         model.head_dim * 2},
                              .cache_rows = table.as<std::int32_t>()},
                      .weight_is_ready = true,
                      .in_chain = true},
                     stream);
        cuda::linear({.input = projected.as<void>(),
                      .m = m,
                      .input_stride = qkv_rows,
                      .weight = out.at(i),
                      .bias = own_bias,
                      .residual = states.as<void>(),
                      .residual_stride = model.hidden,
                      .output = states.as<void>(),
                      .output_stride = model.hidden,
                      .weight_is_ready = true,
                      .in_chain = true},
                     stream);
        cuda::linear({.input = states.as<void>(),
                      .m = m,
                      .input_stride = model.hidden,
                      .weight = up.at(i),
                      .bias = own_bias,
                      .activation = model.gated ? Activation::kSilu : Activation::kGeluTanh,
                      .output = between.as<void>(),
                      .output_stride = up_rows,
                      .norm = norm,
                      .gated = model.gated,
                      .weight_is_ready = true,
                      .in_chain = true},
                     stream);
        cuda::linear({.input = between.as<void>(),
                      .m = m,
                      .input_stride = up_rows,
                      .weight = down.at(i),
                      .bias = own_bias,
                      .residual = states.as<void>(),
                      .residual_stride = model.hidden,
                      .output = states.as<void>(),
                      .output_stride = model.hidden,
                      .weight_is_ready = true,
                      .in_chain = true},
                     stream);
      }
    });
    std::printf(" %.2f |", seconds * 1e6 / static_cast<double>(model.layers));
  }
  std::printf("\n");
}

void run(std::string_view part, WeightFormat format) {
  cudaDeviceProp device{};
  MOQ_CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  const double bandwidth = read_bandwidth();
  std::printf("%s, reading %.2f TB/s\n", device.name, bandwidth * 1e-12);
  if (part != "layers") {
    time_shapes(format, bandwidth);
  }
  if (part != "shapes") {
    std::printf(
        "\nMicroseconds a layer, by tokens; bound: reading the weights\n\n| model | bound |");
    for (const std::int64_t m : kTokens) {
      std::printf(" %ld |", static_cast<long>(m));
    }
    std::printf("\n|---|---|---|---|---|---|---|---|\n");
    for (const Model& model : kModels) {
      time_model(model, format, bandwidth);
    }
  }
}

}  // namespace
}  // namespace moq::kernels

int main(int argc, char** argv) {
  std::string_view part;
  auto format = moq::kernels::WeightFormat::kInt8;
  for (const std::string_view word : std::span(argv, static_cast<std::size_t>(argc)).subspan(1)) {
    if (word == "float16") {
      format = moq::kernels::WeightFormat::kFloat16;
    } else if (word != "int8") {
      part = word;
    }
  }
  moq::kernels::run(part, format);
}
