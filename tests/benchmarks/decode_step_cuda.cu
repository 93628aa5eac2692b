/// Times a decode step of one token by one kernel (kernels/decode_step.h) against one by a kernel
/// for each projection and for attention, of decoders of several widths with INT8 weights, behind
/// several numbers of cached tokens, in CUDA graphs. Prints a Markdown table of microseconds a
/// layer.
///
///   moq_decode_step_bench [layers]      24 if not given
///
/// Build with MOQ_BUILD_BENCHMARKS=ON and CUDA.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "kernels/decode_step.h"
#include "tests/benchmarks/cuda_bench.h"

namespace moq::kernels {
namespace {

constexpr std::int64_t kDim = 64;
constexpr std::int64_t kHeads[] = {1, 2, 4, 6, 8, 9, 10, 11, 12, 14, 16, 18, 20, 25};
constexpr std::int32_t kPasts[] = {0, 512, 2048, 4096, 8192, 16384, 32768};
constexpr std::int64_t kMostPages = 32768 / kPageTokens + 1;

/// A decoder whose numbers don't matter. The chain takes the step as the engine does.
class Decoder {
 public:
  Decoder(std::int64_t heads, std::int64_t layers)
      : shape_{.num_layers = layers,
               .hidden_size = heads * kDim,
               .num_heads = heads,
               .head_dim = kDim,
               .intermediate_size = 4 * heads * kDim,
               .activation = Activation::kGeluTanh},
        hidden_(heads * kDim),
        slab_(kMostPages * heads * kPageTokens * kDim),
        qkv_(3 * hidden_, hidden_, layers),
        out_(hidden_, hidden_, layers),
        up_(4 * hidden_, hidden_, layers),
        down_(hidden_, 4 * hidden_, layers),
        numbers_(4 * hidden_ * 4),
        cache_(2 * layers * slab_ * 2),
        rows_(8 * hidden_ * 2),
        table_(kMostPages * 4),
        sequence_(sizeof(DeviceSequence)),
        cache_row_(4),
        state_(static_cast<std::int64_t>(cuda::decode_step_state_size(shape_))) {
    std::vector<std::int32_t> pages(kMostPages);
    std::iota(pages.begin(), pages.end(), 0);
    copy(pages.data(), pages.size() * 4, table_);
    std::vector<DecodeStepLayer> all;
    for (std::int64_t i = 0; i < layers; ++i) {
      all.push_back({.attention_norm = norm(),
                     .qkv = qkv_.at(i),
                     .qkv_bias = numbers_.as<void>(),
                     .attention_out = out_.at(i),
                     .attention_out_bias = numbers_.as<void>(),
                     .ffn_norm = norm(),
                     .up = up_.at(i),
                     .up_bias = numbers_.as<void>(),
                     .down = down_.at(i),
                     .down_bias = numbers_.as<void>()});
    }
    cuda::prepare_decode_step(shape_, all, state_.as<void>(), nullptr);
  }

  void move_to(std::int32_t past) {
    const DeviceSequence sequence{
        .token_begin = 0, .num_tokens = 1, .past_length = past, .slot = 0};
    copy(&sequence, sizeof(sequence), sequence_);
    copy(&past, sizeof(past), cache_row_);  // pages lie in their order
  }

  void run_one_kernel(cudaStream_t stream) const {
    cuda::decode_step({.shape = shape_,
                       .state = state_.as<void>(),
                       .input = rows_.as<void>(),
                       .pages = pages(0),
                       .layer_stride = 2 * slab_,
                       .page_table = table_.as<std::int32_t>(),
                       .page_table_stride = kMostPages,
                       .sequence = sequence_.as<DeviceSequence>(),
                       .cache_row = cache_row_.as<std::int32_t>(),
                       .output = row(1)},
                      stream);
  }

  void run_chain(cudaStream_t stream) const {
    const auto heads = static_cast<std::int32_t>(shape_.num_heads);
    for (std::int64_t i = 0; i < shape_.num_layers; ++i) {
      project(qkv_.at(i), row(0), row(1), stream,
              {.norm = norm(),
               .qkv = {.head_dim = kDim,
                       .num_heads = heads,
                       .num_kv_heads = heads,
                       .pages = pages(i),
                       .cache_rows = cache_row_.as<std::int32_t>()}});
      cuda::attention({.query = row(1),
                       .query_stride = hidden_,
                       .pages = pages(i),
                       .page_table = table_.as<std::int32_t>(),
                       .page_table_stride = kMostPages,
                       .sequences = sequence_.as<DeviceSequence>(),
                       .num_sequences = 1,
                       .max_tokens = 1,
                       .num_heads = heads,
                       .num_kv_heads = heads,
                       .head_dim = kDim,
                       .scale = 0.125F,
                       .output = row(2),
                       .output_stride = hidden_,
                       .past_is_ready = true},
                      stream);
      project(out_.at(i), row(2), row(0), stream, {.residual = row(0), .residual_stride = hidden_});
      project(up_.at(i), row(0), row(3), stream, {.activation = shape_.activation, .norm = norm()});
      project(down_.at(i), row(3), row(0), stream,
              {.residual = row(0), .residual_stride = hidden_});
    }
  }

 private:
  static void copy(const void* from, std::size_t bytes, const Memory& to) {
    MOQ_CUDA_CHECK(cudaMemcpy(to.as<void>(), from, bytes, cudaMemcpyHostToDevice));
  }
  void* row(std::int64_t i) const { return rows_.as<char>() + i * hidden_ * 2; }
  DeviceNorm norm() const {
    return {.kind = NormKind::kLayerNorm,
            .weight = numbers_.as<float>(),
            .bias = numbers_.as<float>(),
            .epsilon = shape_.norm_epsilon};
  }
  DevicePages pages(std::int64_t layer) const {
    char* const keys = cache_.as<char>() + 2 * layer * slab_ * 2;
    return {.keys = keys, .values = keys + slab_ * 2};
  }
  void project(const PackedLinear& weight, const void* input, void* output, cudaStream_t stream,
               DeviceLinearArgs args) const {
    args.input = input;
    args.m = 1;
    args.input_stride = weight.shape.k;
    args.weight = weight;
    args.bias = numbers_.as<void>();
    args.output = output;
    args.output_stride = args.qkv.pages.keys == nullptr ? weight.shape.n : hidden_;
    args.weight_is_ready = true;
    args.in_chain = true;
    cuda::linear(args, stream);
  }

  DecodeStepShape shape_;
  std::int64_t hidden_;
  std::int64_t slab_;  ///< numbers of a layer's keys
  Weights qkv_;
  Weights out_;
  Weights up_;
  Weights down_;
  Memory numbers_;  ///< norms and biases
  Memory cache_;
  Memory rows_;
  Memory table_;
  Memory sequence_;
  Memory cache_row_;
  Memory state_;
};

void run(std::int64_t layers) {
  cudaDeviceProp device{};
  MOQ_CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s: microseconds a layer, one kernel / chain of kernels, of %ld layers\n\n| heads |",
              device.name, static_cast<long>(layers));
  for (const std::int32_t past : kPasts) {
    std::printf(" %d cached |", past);
  }
  std::printf("\n|---|---|---|---|---|---|---|---|\n");
  for (const std::int64_t heads : kHeads) {
    Decoder decoder(heads, layers);
    std::printf("| %ld |", static_cast<long>(heads));
    for (const std::int32_t past : kPasts) {
      decoder.move_to(past);
      const auto time = [&](auto method) {
        return time_graph([&](cudaStream_t stream) { (decoder.*method)(stream); }) * 1e6 /
               static_cast<double>(layers);
      };
      std::printf(" %.2f / %.2f |", time(&Decoder::run_one_kernel), time(&Decoder::run_chain));
    }
    std::printf("\n");
  }
}

}  // namespace
}  // namespace moq::kernels

int main(int argc, char** argv) {
  moq::kernels::run(argc > 1 ? std::atol(argv[1]) : 24);
}
