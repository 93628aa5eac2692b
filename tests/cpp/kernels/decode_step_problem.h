#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "kernels/decode_step.h"
#include "kernels/linear.h"
#include "tests/cpp/kernels/decode_step_layers.h"
#include "tests/cpp/kernels/exact_activation.h"

/// A random decoder on the device, a step of it by cuda::decode_step and by the kernels of one
/// projection each, and its definition in float64.
namespace moq::kernels::testing {

/// Ends a test as skipped on a GPU that such a step is not computed on.
#define MOQ_SKIP_UNSUPPORTED(SHAPE)                                          \
  MOQ_SKIP_WITHOUT_GPU();                                                    \
  if (!cuda::decode_step_supports(SHAPE)) {                                  \
    GTEST_SKIP() << "this GPU does not compute a decode step in one kernel"; \
  }

inline DecodeStepShape shape_of(std::int64_t heads, std::int64_t layers,
                                DType dtype = DType::kFloat16) {
  return {.num_layers = layers,
          .hidden_size = 64 * heads,
          .num_heads = heads,
          .head_dim = 64,
          .intermediate_size = 256 * heads,
          .activation = Activation::kGeluTanh,
          .norm_epsilon = StepNorm::kEpsilon,
          .dtype = dtype};
}

template <typename Values>
double rms_error(const Values& values, const Numbers& expected) {
  double sum = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = values[i] - expected[i];
    sum += difference * difference;
  }
  return std::sqrt(sum / static_cast<double>(expected.size()));
}

/// What a step leaves: x, and the cache as numbers, [layers, {k, v}, pages, heads, 64, 64].
struct StepResult {
  std::vector<float> output;
  std::vector<float> cache;
};

class StepProblem {
 public:
  static constexpr std::int64_t kDim = 64;

  StepProblem(std::int64_t heads, std::int64_t num_layers, std::int32_t past,
              DType dtype = DType::kFloat16, unsigned seed = 1)
      : shape_(shape_of(heads, num_layers, dtype)),
        past_(past),
        num_pages_(past / kPageTokens + 2),
        generator_(seed) {
    const std::int64_t hidden = shape_.hidden_size;
    for (std::int64_t i = 0; i < num_layers; ++i) {
      const auto projection = [&](std::int64_t n, std::int64_t k) {
        return StepProjection(n, k, dtype, generator_);
      };
      layers_.push_back({StepNorm(hidden, generator_), projection(3 * hidden, hidden),
                         projection(hidden, hidden), StepNorm(hidden, generator_),
                         projection(4 * hidden, hidden), projection(hidden, 4 * hidden)});
    }
    input_ = random(static_cast<std::size_t>(hidden));
    cache_ = random(static_cast<std::size_t>(num_layers * 2 * slab()));
    for (std::int64_t i = 0; i < num_pages_; ++i) {  // two slots, ours is the second
      table_.push_back(-1);
    }
    for (std::int64_t i = 0; i < num_pages_; ++i) {
      table_.push_back(static_cast<std::int32_t>(num_pages_ - 1 - i));
    }
    sequence_dev_ = Buffer(sizeof(DeviceSequence));
    table_dev_ = Buffer(table_);
    cache_dev_ = Buffer(to_bytes(cache_, dtype));
    input_dev_ = Buffer(to_bytes(input_, dtype));
    row_dev_ = Buffer(sizeof(std::int32_t));
    move_to(past);
    output_dev_ = Buffer(to_bytes(std::vector<float>(input_.size(), -7.0F), dtype));
  }

  /// So many keys are cached: no more than at first.
  void move_to(std::int32_t past, cudaStream_t stream = nullptr) {
    past_ = past;
    cache_row_ = table_[num_pages_ + past / kPageTokens] * static_cast<std::int32_t>(kPageTokens) +
                 past % static_cast<std::int32_t>(kPageTokens);
    const DeviceSequence sequence{
        .token_begin = 0, .num_tokens = 1, .past_length = past, .slot = 1};
    MOQ_CUDA_CHECK(cudaMemcpyAsync(sequence_dev_.data(), &sequence, sizeof(sequence),
                                   cudaMemcpyHostToDevice, stream));
    MOQ_CUDA_CHECK(cudaMemcpyAsync(row_dev_.data(), &cache_row_, sizeof(cache_row_),
                                   cudaMemcpyHostToDevice, stream));
  }
  void set_activation(Activation activation) { shape_.activation = activation; }
  void drop_biases() {
    for (StepLayer& layer : layers_) {
      layer.drop_biases();
    }
  }

  const DecodeStepShape& shape() const { return shape_; }
  std::vector<float>& input() { return input_; }
  std::vector<float>& cache() { return cache_; }
  std::int32_t& cache_row() { return cache_row_; }
  std::vector<DecodeStepLayer> layers() const {
    std::vector<DecodeStepLayer> layers;
    for (const StepLayer& layer : layers_) {
      layers.push_back(layer.device());
    }
    return layers;
  }

  /// Brings changed numbers to the device, and the cache back to what it was.
  void upload() {
    const auto copy = [](const Buffer& to, const auto& from) {
      MOQ_CUDA_CHECK(cudaMemcpy(to.data(), from.data(), from.size() * sizeof(from[0]),
                                cudaMemcpyHostToDevice));
    };
    copy(input_dev_, to_bytes(input_, shape_.dtype));
    copy(cache_dev_, to_bytes(cache_, shape_.dtype));
    copy(row_dev_, std::vector{cache_row_});
    // A copy from pageable memory may be on its way yet, and other streams don't wait for it.
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  }

  DecodeStepArgs args() {
    if (state_ == nullptr) {
      state_ = std::make_unique<Buffer>(cuda::decode_step_state_size(shape_));
      cuda::prepare_decode_step(shape_, layers(), state_->data(), nullptr);
    }
    return {.shape = shape_,
            .state = state_->data(),
            .input = input_dev_.data(),
            .pages = pages(0),
            .layer_stride = 2 * slab(),
            .page_table = table_dev_.as<std::int32_t>(),
            .page_table_stride = num_pages_,
            .sequence = sequence_dev_.as<DeviceSequence>(),
            .cache_row = row_dev_.as<std::int32_t>(),
            .output = output_dev_.data()};
  }

  StepResult read() const {
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    return {numbers(output_dev_, input_.size()), numbers(cache_dev_, cache_.size())};
  }

  StepResult run() {
    upload();
    cuda::decode_step(args(), nullptr);
    return read();
  }

  /// The same by a kernel for each projection and for attention.
  StepResult run_chain() {
    upload();
    const std::int64_t hidden = shape_.hidden_size;
    const std::size_t row = static_cast<std::size_t>(hidden) * size_of(shape_.dtype);
    const Buffer q(row);
    const Buffer attended(row);
    const Buffer inner(4 * row);
    MOQ_CUDA_CHECK(
        cudaMemcpy(output_dev_.data(), input_dev_.data(), row, cudaMemcpyDeviceToDevice));
    const auto project = [&](const StepProjection& projection, const void* input, void* output,
                             DeviceLinearArgs args) {
      args.input = input;
      args.m = 1;
      args.input_stride = projection.k;
      args.weight = projection.weight();
      args.bias = projection.bias_or_null();
      args.output = output;
      args.output_stride = projection.n;
      args.dtype = shape_.dtype;
      cuda::linear(args, nullptr);
    };
    void* const x = output_dev_.data();
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const StepLayer& layer = layers_[i];
      const auto heads = static_cast<std::int32_t>(shape_.num_heads);
      project(layer.qkv, x, q.data(),
              {.norm = layer.attention_norm.device(),
               .qkv = {.head_dim = static_cast<std::int32_t>(kDim),
                       .num_heads = heads,
                       .num_kv_heads = heads,
                       .pages = pages(static_cast<std::int64_t>(i)),
                       .cache_rows = row_dev_.as<std::int32_t>()}});
      cuda::attention({.query = q.data(),
                       .query_stride = hidden,
                       .pages = pages(static_cast<std::int64_t>(i)),
                       .page_table = table_dev_.as<std::int32_t>(),
                       .page_table_stride = num_pages_,
                       .sequences = sequence_dev_.as<DeviceSequence>(),
                       .num_sequences = 1,
                       .max_tokens = 1,
                       .num_heads = heads,
                       .num_kv_heads = heads,
                       .head_dim = kDim,
                       .scale = 0.125F,
                       .output = attended.data(),
                       .output_stride = hidden,
                       .dtype = shape_.dtype},
                      nullptr);
      project(layer.out, attended.data(), x, {.residual = x, .residual_stride = hidden});
      project(layer.up, x, inner.data(),
              {.activation = shape_.activation, .norm = layer.ffn_norm.device()});
      project(layer.down, inner.data(), x, {.residual = x, .residual_stride = hidden});
    }
    return read();
  }

  /// The definition: x at the end, and the new token's keys and values, [layers, {k, v}, hidden].
  std::pair<Numbers, Numbers> define() const {
    Numbers x(input_.begin(), input_.end());
    Numbers appended;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const StepLayer& layer = layers_[i];
      const Numbers qkv = layer.qkv.multiply(layer.attention_norm.apply(x));
      appended.insert(appended.end(), qkv.begin() + shape_.hidden_size, qkv.end());
      add(x, layer.out.multiply(attend(qkv, static_cast<std::int64_t>(i))));
      Numbers inner = layer.up.multiply(layer.ffn_norm.apply(x));
      for (double& value : inner) {
        value = exact_activation(shape_.activation, value);
      }
      add(x, layer.down.multiply(inner));
    }
    return {x, appended};
  }

  /// The new token's keys and values in a cache, as define() gives them.
  Numbers appended(const std::vector<float>& cache) const {
    Numbers numbers;
    for (std::int64_t i = 0; i < shape_.num_layers * 2; ++i) {
      for (std::int64_t column = 0; column < shape_.hidden_size; ++column) {
        numbers.push_back(cache[place(i, column / kDim, past_) + column % kDim]);
      }
    }
    return numbers;
  }
  /// Overwrites them, so that what is left can be compared.
  void forget_appended(std::vector<float>& cache) const {
    for (std::int64_t i = 0; i < shape_.num_layers * 2; ++i) {
      for (std::int64_t column = 0; column < shape_.hidden_size; ++column) {
        cache[place(i, column / kDim, past_) + column % kDim] = 0.0F;
      }
    }
  }

  /// Where a key lies in the cache's numbers; half: 2 * layer, + 1 for values.
  std::size_t place(std::int64_t half, std::int64_t head, std::int32_t token) const {
    const std::int64_t page = table_[num_pages_ + token / kPageTokens];
    return static_cast<std::size_t>(
        half * slab() +
        ((page * shape_.num_heads + head) * kPageTokens + token % kPageTokens) * kDim);
  }

 private:
  std::int64_t slab() const { return num_pages_ * shape_.num_heads * kPageTokens * kDim; }
  DevicePages pages(std::int64_t layer) const {
    auto* const base = cache_dev_.as<std::byte>();
    const std::int64_t bytes = slab() * static_cast<std::int64_t>(size_of(shape_.dtype));
    return {.keys = base + 2 * layer * bytes,
            .values = base + (2 * layer + 1) * bytes,
            .dtype = shape_.dtype};
  }
  std::vector<float> numbers(const Buffer& buffer, std::size_t count) const {
    std::vector<std::byte> bytes(count * size_of(shape_.dtype));
    buffer.copy_to(bytes);
    return from_bytes(bytes, shape_.dtype);
  }
  std::vector<float> random(std::size_t count) {
    std::uniform_real_distribution<float> number(-1.5F, 1.7F);
    std::vector<float> values(count);
    std::generate(values.begin(), values.end(), [&] { return number(generator_); });
    return from_bytes(to_bytes(values, shape_.dtype), shape_.dtype);
  }
  static void add(Numbers& x, const Numbers& y) {
    std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<>());
  }

  Numbers attend(const Numbers& qkv, std::int64_t layer) const {
    const std::int64_t hidden = shape_.hidden_size;
    Numbers output(static_cast<std::size_t>(hidden), 0.0);
    for (std::int64_t head = 0; head < shape_.num_heads; ++head) {
      const auto number = [&](int of_values, std::int32_t token, std::int64_t d) -> double {
        return token == past_ ? qkv[(1 + of_values) * hidden + head * kDim + d]
                              : cache_[place(2 * layer + of_values, head, token) + d];
      };
      Numbers weights;
      double total = 0.0;
      for (std::int32_t token = 0; token <= past_; ++token) {
        double score = 0.0;
        for (std::int64_t d = 0; d < kDim; ++d) {
          score += qkv[head * kDim + d] * number(0, token, d) * 0.125;
        }
        weights.push_back(std::exp(score));
        total += weights.back();
      }
      for (std::int32_t token = 0; token <= past_; ++token) {
        for (std::int64_t d = 0; d < kDim; ++d) {
          output[head * kDim + d] += weights[token] / total * number(1, token, d);
        }
      }
    }
    return output;
  }

  DecodeStepShape shape_;
  std::int32_t past_;
  std::int64_t num_pages_;
  std::mt19937 generator_;
  std::vector<StepLayer> layers_;
  std::vector<float> input_;
  std::vector<float> cache_;
  std::vector<std::int32_t> table_;
  std::int32_t cache_row_ = 0;
  Buffer input_dev_{0};
  Buffer cache_dev_{0};
  Buffer table_dev_{0};
  Buffer sequence_dev_{0};
  Buffer row_dev_{0};
  Buffer output_dev_{0};
  std::unique_ptr<Buffer> state_;
};

}  // namespace moq::kernels::testing
