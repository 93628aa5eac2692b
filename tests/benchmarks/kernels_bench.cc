/// Times the CPU kernels beside `linear` at the shapes of named models, on one thread unless a
/// benchmark's name says otherwise. Counters: GB/s of what must be read and written at least, to be
/// compared with ReadBandwidth of the same run; GFLOP/s of the products, 2 per multiply-add.
/// Build with MOQ_BUILD_BENCHMARKS=ON (needs libbenchmark-dev), run moq_kernels_bench.
#include <benchmark/benchmark.h>

#include <random>
#include <span>
#include <vector>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/bandwidth.h"
#include "kernels/cpu/isa.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"
#include "kernels/sampling.h"

namespace moq::kernels {
namespace {

std::vector<float> random_floats(std::int64_t size, float deviation = 1.0F) {
  std::mt19937 generator(1);
  std::normal_distribution<float> distribution(0.0F, deviation);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) {
    value = distribution(generator);
  }
  return values;
}

void set_bandwidth(benchmark::State& state, std::int64_t floats) {
  state.counters["GB/s"] = benchmark::Counter(4e-9 * static_cast<double>(floats),
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void set_flops(benchmark::State& state, std::int64_t multiply_adds) {
  state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * static_cast<double>(multiply_adds),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void ReadBandwidth(benchmark::State& state) {
  const std::vector<float> buffer(std::size_t{1} << 27, 1.0F);  // 512 MiB
  const ThreadScope threads(static_cast<int>(state.range(1)));
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        cpu::measure_read(std::as_bytes(std::span(buffer)), state.range(0) != 0));
  }
  set_bandwidth(state, std::ssize(buffer));
}
BENCHMARK(ReadBandwidth)->ArgNames({"prefetch", "threads"})->ArgsProduct({{0, 1}, {1, 2}});

/// A decode step of GPT-2 124M's attention: 12 layers' caches in turn, as cold as they are between
/// the layers' weights.
void AttentionDecode(benchmark::State& state) {
  const std::int64_t context = state.range(0);
  constexpr std::int64_t kLayers = 12;
  constexpr std::int64_t kHeads = 12;
  constexpr std::int64_t kHeadDim = 64;
  const std::int64_t slab = kHeads * context * kHeadDim;
  const std::vector<float> keys = random_floats(kLayers * slab);
  const std::vector<float> values = keys;
  const std::vector<float> query = random_floats(kHeads * kHeadDim);
  std::vector<float> output(query.size());
  const AttentionSequence sequence{0, 1, 0, context - 1};
  const ThreadScope threads(static_cast<int>(state.range(1)));
  for (auto _ : state) {
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      cpu::attention({.query = query.data(),
                      .query_stride = kHeads * kHeadDim,
                      .keys = keys.data() + layer * slab,
                      .values = values.data() + layer * slab,
                      .slot_stride = slab,
                      .kv_head_stride = context * kHeadDim,
                      .key_stride = kHeadDim,
                      .sequences = &sequence,
                      .num_sequences = 1,
                      .num_heads = kHeads,
                      .num_kv_heads = kHeads,
                      .head_dim = kHeadDim,
                      .causal = true,
                      .scale = 0.125F,
                      .output = output.data(),
                      .output_stride = kHeads * kHeadDim});
    }
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 2 * kLayers * slab);
}
BENCHMARK(AttentionDecode)
    ->ArgNames({"context", "threads"})
    ->ArgsProduct({{64, 448, 1024, 4096}, {1, 2}})
    ->Unit(benchmark::kMicrosecond);

/// One layer's attention over a prompt: GPT-2 (12 heads) or SmolLM2 (9 heads of 3 kv heads).
void AttentionPrefill(benchmark::State& state) {
  const std::int64_t num_tokens = state.range(0);
  const std::int64_t num_heads = state.range(1);
  const std::int64_t num_kv_heads = state.range(2);
  constexpr std::int64_t kHeadDim = 64;
  const std::int64_t width = (num_heads + 2 * num_kv_heads) * kHeadDim;
  const std::vector<float> rows = random_floats(num_tokens * width);
  std::vector<float> output(static_cast<std::size_t>(num_tokens * num_heads * kHeadDim));
  const AttentionSequence sequence{0, num_tokens, 0, 0};
  const ThreadScope threads(static_cast<int>(state.range(3)));
  for (auto _ : state) {
    cpu::attention({.query = rows.data(),
                    .query_stride = width,
                    .keys = rows.data() + num_heads * kHeadDim,
                    .values = rows.data() + (num_heads + num_kv_heads) * kHeadDim,
                    .slot_stride = width,
                    .kv_head_stride = kHeadDim,
                    .key_stride = width,
                    .sequences = &sequence,
                    .num_sequences = 1,
                    .num_heads = num_heads,
                    .num_kv_heads = num_kv_heads,
                    .head_dim = kHeadDim,
                    .causal = true,
                    .scale = 0.125F,
                    .output = output.data(),
                    .output_stride = num_heads * kHeadDim});
    benchmark::ClobberMemory();
  }
  set_flops(state, num_tokens * (num_tokens + 1) / 2 * num_heads * kHeadDim * 2);
}
BENCHMARK(AttentionPrefill)
    ->ArgNames({"tokens", "heads", "kv_heads", "threads"})
    ->ArgsProduct({{16, 128, 512}, {12}, {12}, {1, 2}})
    ->Args({512, 9, 3, 1})
    ->Unit(benchmark::kMicrosecond);

void LayerNorm(benchmark::State& state) {
  const std::int64_t num_tokens = state.range(0);
  const std::int64_t hidden_size = state.range(1);
  const std::vector<float> input = random_floats(num_tokens * hidden_size);
  const std::vector<float> weight = random_floats(hidden_size);
  std::vector<float> residual = input;
  std::vector<float> output(input.size());
  for (auto _ : state) {
    cpu::layer_norm({.input = input.data(),
                     .residual = residual.data(),
                     .sum = nullptr,
                     .weight = weight.data(),
                     .bias = weight.data(),
                     .output = output.data(),
                     .num_tokens = num_tokens,
                     .hidden_size = hidden_size,
                     .epsilon = 1e-5F});
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 3 * num_tokens * hidden_size);
}
BENCHMARK(LayerNorm)->ArgNames({"tokens", "hidden"})->Args({1, 768})->Args({512, 768});

void RmsNorm(benchmark::State& state) {
  const std::int64_t num_tokens = state.range(0);
  const std::int64_t hidden_size = state.range(1);
  const std::vector<float> input = random_floats(num_tokens * hidden_size);
  const std::vector<float> weight = random_floats(hidden_size);
  std::vector<float> output(input.size());
  for (auto _ : state) {
    cpu::rms_norm({.input = input.data(),
                   .weight = weight.data(),
                   .output = output.data(),
                   .num_tokens = num_tokens,
                   .hidden_size = hidden_size,
                   .epsilon = 1e-5F});
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 2 * num_tokens * hidden_size);
}
BENCHMARK(RmsNorm)->ArgNames({"tokens", "hidden"})->Args({1, 576})->Args({512, 576});

void Elementwise(benchmark::State& state) {
  const auto activation = static_cast<Activation>(state.range(0));
  const std::vector<float> input = random_floats(state.range(1), 3.0F);
  std::vector<float> output(input.size());
  for (auto _ : state) {
    cpu::activation({.input = input.data(),
                     .output = output.data(),
                     .size = state.range(1),
                     .activation = activation});
    benchmark::ClobberMemory();
  }
  state.SetLabel(name_of(activation));
  set_bandwidth(state, 2 * state.range(1));
}
BENCHMARK(Elementwise)
    ->ArgNames({"activation", "size"})
    ->ArgsProduct({benchmark::CreateDenseRange(0, 6, 1), {3072}});

void GatedSilu(benchmark::State& state) {
  const std::int64_t m = state.range(0);
  const std::int64_t n = state.range(1);
  const std::vector<float> gate_up = random_floats(m * 2 * n, 3.0F);
  std::vector<float> output(static_cast<std::size_t>(m * n));
  for (auto _ : state) {
    cpu::gated_activation({.gate_up = gate_up.data(),
                           .output = output.data(),
                           .m = m,
                           .n = n,
                           .activation = Activation::kSilu});
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 3 * m * n);
}
BENCHMARK(GatedSilu)->ArgNames({"m", "n"})->Args({1, 1536})->Args({512, 1536});

void Softmax(benchmark::State& state) {
  const std::vector<float> input = random_floats(state.range(0) * state.range(1), 3.0F);
  std::vector<float> output(input.size());
  for (auto _ : state) {
    cpu::softmax(
        {.input = input.data(), .output = output.data(), .m = state.range(0), .n = state.range(1)});
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 2 * state.range(0) * state.range(1));
}
BENCHMARK(Softmax)->ArgNames({"m", "n"})->Args({1, 50257})->Args({128, 128});

void Rotary(benchmark::State& state) {
  const std::int64_t num_tokens = state.range(0);
  constexpr std::int64_t kHeads = 12;  // 9 query and 3 key heads: SmolLM2
  constexpr std::int64_t kHeadDim = 64;
  constexpr std::int64_t kWidth = 15 * kHeadDim;
  std::vector<float> rows = random_floats(num_tokens * kWidth);
  std::vector<float> cos(2048 * kHeadDim / 2);
  std::vector<float> sin(cos.size());
  cpu::rotary_table({.theta = 100000.0F,
                     .rotary_dim = kHeadDim,
                     .num_positions = 2048,
                     .cos = cos.data(),
                     .sin = sin.data()});
  std::vector<std::int64_t> positions(static_cast<std::size_t>(num_tokens));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    positions[static_cast<std::size_t>(t)] = t;
  }
  for (auto _ : state) {
    cpu::rotary({.heads = rows.data(),
                 .num_tokens = num_tokens,
                 .num_heads = kHeads,
                 .token_stride = kWidth,
                 .head_stride = kHeadDim,
                 .rotary_dim = kHeadDim,
                 .positions = positions.data(),
                 .cos = cos.data(),
                 .sin = sin.data(),
                 .num_positions = 2048});
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 2 * num_tokens * kHeads * kHeadDim);
}
BENCHMARK(Rotary)->ArgNames({"tokens"})->Arg(1)->Arg(512);

void Embedding(benchmark::State& state) {
  const std::int64_t num_tokens = state.range(0);
  constexpr std::int64_t kHidden = 768;
  constexpr std::int64_t kVocabulary = 50257;
  const std::vector<std::int8_t> codes(kVocabulary * kHidden, 3);
  const std::vector<float> scales(kVocabulary, 0.01F);
  const std::vector<float> positions = random_floats(1024 * kHidden);
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> rows;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    tokens.push_back(t * 7919 % kVocabulary);
    rows.push_back(t);
  }
  std::vector<float> output(static_cast<std::size_t>(num_tokens * kHidden));
  const EmbeddingLookup lookups[] = {
      {.table = {.data = codes.data(),
                 .dtype = DType::kInt8,
                 .scales = scales.data(),
                 .group_size = kHidden,
                 .num_rows = kVocabulary},
       .rows = tokens.data()},
      {.table = {.data = positions.data(), .num_rows = 1024}, .rows = rows.data()}};
  for (auto _ : state) {
    cpu::embedding({.lookups = lookups,
                    .output = output.data(),
                    .num_tokens = num_tokens,
                    .hidden_size = kHidden});
    benchmark::ClobberMemory();
  }
  set_bandwidth(state, 2 * num_tokens * kHidden);
}
BENCHMARK(Embedding)->ArgNames({"tokens"})->Arg(1)->Arg(512);

/// One row of GPT-2's vocabulary; the largest logits stand out as a language model's do.
void Sample(benchmark::State& state, SamplingParams params) {
  const std::vector<float> logits = random_floats(50257, 3.0F);
  const std::vector<std::int64_t> history = {1, 2, 3, 5, 8};
  SamplingRow row{.params = params, .history = history.data(), .history_length = 5};
  std::int64_t token = 0;
  for (auto _ : state) {
    ++row.step;
    cpu::sample({.logits = logits.data(),
                 .batch_size = 1,
                 .vocab_size = 50257,
                 .logits_stride = 50257,
                 .rows = &row,
                 .tokens = &token});
    benchmark::DoNotOptimize(token);
  }
}
BENCHMARK_CAPTURE(Sample, greedy, {.temperature = 0.0F})->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Sample, penalised_greedy, {.temperature = 0.0F, .repetition_penalty = 1.1F})
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Sample, temperature, {.temperature = 0.8F})->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Sample, top_k, {.top_k = 50})->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Sample, top_p, {.top_p = 0.9F})->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Sample, top_p_flat, {.temperature = 10.0F, .top_p = 0.9F})
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Sample, min_p, {.min_p = 0.05F})->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace moq::kernels

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  benchmark::AddCustomContext("instruction set",
                              moq::kernels::cpu::name_of(moq::kernels::cpu::active_isa()));
  benchmark::RunSpecifiedBenchmarks();
}
