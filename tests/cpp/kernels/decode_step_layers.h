#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/decode_step.h"
#include "kernels/linear.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/typed_bytes.h"

/// Random layers of a decoder, on the device and as numbers.
namespace moq::kernels::testing {

using Numbers = std::vector<double>;

/// A projection: numbers on the host, and packed on the device.
struct StepProjection {
  std::int64_t n;
  std::int64_t k;
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::vector<float> bias;
  Buffer packed;
  Buffer bias_dev;

  template <typename Generator>
  StepProjection(std::int64_t rows, std::int64_t cols, DType dtype, Generator& generator)
      : n(rows),
        k(cols),
        packed(cuda::packed_linear_size(shape())),
        bias_dev(static_cast<std::size_t>(rows) * size_of(dtype)) {
    std::uniform_real_distribution<float> spread(0.7F, 1.3F);
    codes.resize(static_cast<std::size_t>(n * k));
    for (std::size_t i = 0; i < codes.size(); i += 4) {  // k is a multiple of 4
      const auto word = static_cast<std::uint32_t>(generator());
      std::memcpy(codes.data() + i, &word, sizeof(word));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      scales.push_back(spread(generator) / (74.0F * std::sqrt(static_cast<float>(k))));
      bias.push_back(0.2F * (spread(generator) - 1.0F));
    }
    const std::vector<std::byte> bytes = to_bytes(bias, dtype);
    bias = from_bytes(bytes, dtype);
    bias_dev = Buffer(bytes);
    const Buffer codes_dev(codes);
    const Buffer scales_dev(scales);
    cuda::pack_linear({.shape = shape(),
                       .weight = codes_dev.data(),
                       .row_stride = k,
                       .col_stride = 1,
                       .scales = scales_dev.as<float>(),
                       .packed = packed.data()},
                      nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  }

  LinearShape shape() const { return {.n = n, .k = k, .group_size = k}; }
  PackedLinear weight() const { return {.shape = shape(), .data = packed.data()}; }
  const void* bias_or_null() const { return bias.empty() ? nullptr : bias_dev.data(); }

  Numbers multiply(const Numbers& input) const {
    Numbers output(static_cast<std::size_t>(n));
    for (std::int64_t row = 0; row < n; ++row) {
      double sum = 0.0;
      for (std::int64_t col = 0; col < k; ++col) {
        sum += codes[row * k + col] * input[col];
      }
      output[row] = sum * scales[row] + (bias.empty() ? 0.0F : bias[row]);
    }
    return output;
  }
};

struct StepNorm {
  std::vector<float> weight;
  std::vector<float> bias;
  Buffer weight_dev{0};
  Buffer bias_dev{0};
  static constexpr float kEpsilon = 1e-5F;

  template <typename Generator>
  StepNorm(std::int64_t size, Generator& generator) {
    std::uniform_real_distribution<float> spread(0.7F, 1.3F);
    for (std::int64_t i = 0; i < size; ++i) {
      weight.push_back(spread(generator));
      bias.push_back(spread(generator) - 1.0F);
    }
    weight_dev = Buffer(weight);
    bias_dev = Buffer(bias);
  }

  DeviceNorm device() const {
    return {.kind = NormKind::kLayerNorm,
            .weight = weight_dev.as<float>(),
            .bias = bias.empty() ? nullptr : bias_dev.as<float>(),
            .epsilon = kEpsilon};
  }
  Numbers apply(const Numbers& x) const {
    const auto size = static_cast<double>(x.size());
    double mean = 0.0;
    for (const double value : x) {
      mean += value / size;
    }
    double variance = 0.0;
    for (const double value : x) {
      variance += (value - mean) * (value - mean) / size;
    }
    Numbers y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[i] = (x[i] - mean) / std::sqrt(variance + kEpsilon) * weight[i] +
             (bias.empty() ? 0.0F : bias[i]);
    }
    return y;
  }
};

struct StepLayer {
  StepNorm attention_norm;
  StepProjection qkv;
  StepProjection out;
  StepNorm ffn_norm;
  StepProjection up;
  StepProjection down;

  void drop_biases() {
    for (std::vector<float>* bias :
         {&attention_norm.bias, &qkv.bias, &out.bias, &ffn_norm.bias, &up.bias, &down.bias}) {
      bias->clear();
    }
  }
  DecodeStepLayer device() const {
    return {.attention_norm = attention_norm.device(),
            .qkv = qkv.weight(),
            .qkv_bias = qkv.bias_or_null(),
            .attention_out = out.weight(),
            .attention_out_bias = out.bias_or_null(),
            .ffn_norm = ffn_norm.device(),
            .up = up.weight(),
            .up_bias = up.bias_or_null(),
            .down = down.weight(),
            .down_bias = down.bias_or_null()};
  }
};

}  // namespace moq::kernels::testing
