#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/common/visit.h"
#include "kernels/linear.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/exact_activation.h"
#include "tests/cpp/kernels/linear_problem.h"
#include "tests/cpp/kernels/typed_bytes.h"

/// cuda::linear on random layers, and its definition in float64 with a bound for the error of its
/// arithmetic: exact products, float32 sums, one rounding of the result.
namespace moq::kernels::testing {

/// How a problem is multiplied.
struct Call {
  DType dtype = DType::kFloat16;
  Activation activation = Activation::kNone;
  bool bias = true;
  bool residual = false;
  std::int64_t padding = 0;         ///< elements between rows of input, residual and output
  std::int64_t output_padding = 0;  ///< more of them between rows of the output
  std::int64_t offset = 0;          ///< elements before the input's first row
  bool weight_is_ready = false;
  bool spread = false;
  bool in_chain = false;
  NormKind norm = NormKind::kNone;
  bool norm_bias = false;
  bool row_scales = false;
  bool gated = false;
  bool float32_output = false;
  /// Without pointers: they are made where rotary_dim is not 0, and where `cached` is set.
  DeviceQkvOutput qkv = {};
  bool cached = false;
};

/// A number and how far from it the arithmetic may end.
struct Bounded {
  double value = 0.0;
  double error = 0.0;
};

struct Outcome {
  std::vector<float> output;      ///< all that was written
  std::vector<Bounded> expected;  ///< the definition, in the same order
};

inline void expect_close(const Outcome& outcome) {
  ASSERT_EQ(outcome.output.size(), outcome.expected.size());
  for (std::size_t i = 0; i < outcome.output.size(); ++i) {
    const auto& [value, error] = outcome.expected[i];
    ASSERT_LE(std::fabs(outcome.output[i] - value), error)
        << "element " << i << ": " << outcome.output[i] << ", expected " << value;
  }
}

/// Rounded once to dtype: float16 below its normal numbers has an absolute error.
inline double rounding_error(double value, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return std::max(std::fabs(value) * 0x1p-11, 0x1p-25);
    case DType::kBFloat16:
      return std::fabs(value) * 0x1p-8;
    default:
      return std::fabs(value) * 0x1p-24;
  }
}

/// A linear layer on the device with all that its regions need.
class LinearCudaProblem {
 public:
  static constexpr std::int64_t kPages = 3;

  LinearCudaProblem(const LinearProblem& problem, Call call)
      : problem_(problem),
        call_(std::move(call)),
        m_(problem.m),
        n_(problem.shape.n),
        k_(problem.shape.k),
        input_(rounded(problem.input)),
        bias_(rounded(problem.bias)) {
    for (std::int64_t i = 0; i < m_ * n_; ++i) {
      residual_.push_back(0.25F * static_cast<float>(i % 13) - 1.0F);
    }
    for (std::int64_t i = 0; i < k_; ++i) {
      norm_weight_.push_back(1.0F + 0.125F * static_cast<float>(i % 7 - 3));
      norm_bias_.push_back(0.0625F * static_cast<float>(i % 5 - 2));
    }
    for (std::int64_t i = 0; i < m_; ++i) {
      row_scales_.push_back(0.5F + 0.125F * static_cast<float>(i % 5));
      positions_.push_back(static_cast<std::int32_t>(i * 5 % 11));
      cache_rows_.push_back(i % 4 == 2 ? -1 : static_cast<std::int32_t>(i * 37 % (kPages * 64)));
    }
    for (int i = 0; i < 11 * call_.qkv.rotary.rotary_dim / 2; ++i) {
      cos_.push_back(std::cos(0.7F * static_cast<float>(i)));
      sin_.push_back(std::sin(0.7F * static_cast<float>(i)));
    }
  }

  /// Multiplies by `launch`, cuda::linear or one of its kernels.
  template <typename Launch>
  Outcome run(const Launch& launch) const {
    const OnDevice<std::byte> weight(Device::kCuda, problem_.weight_data());
    const OnDevice<float> scales(Device::kCuda, problem_.scales);
    const OnDevice<std::int32_t> zero_points(Device::kCuda, problem_.zero_points);
    const OnDevice<std::byte> packed(
        Device::kCuda, std::vector<std::byte>(cuda::packed_linear_size(problem_.shape)));
    PackLinearArgs pack = problem_.pack_args(weight.data());
    pack.scales = scales.data();
    pack.zero_points = problem_.shape.asymmetric ? zero_points.data() : nullptr;
    pack.packed = packed.data();
    cuda::pack_linear(pack, nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());

    const auto on_device = [&](const std::vector<float>& values) {
      return OnDevice<std::byte>(Device::kCuda, to_bytes(values, call_.dtype));
    };
    const auto input = on_device(spread(input_, m_, k_, call_.padding, call_.offset));
    const auto bias = on_device(bias_);
    const auto residual = on_device(spread(residual_, m_, n_, call_.padding, 0));
    const OnDevice<float> norm_weight(Device::kCuda, norm_weight_);
    const OnDevice<float> norm_bias(Device::kCuda, norm_bias_);
    const OnDevice<float> row_scales(Device::kCuda, row_scales_);
    const OnDevice<std::int32_t> positions(Device::kCuda, positions_);
    const OnDevice<std::int32_t> cache_rows(Device::kCuda, cache_rows_);
    const OnDevice<float> cosines(Device::kCuda, cos_);
    const OnDevice<float> sines(Device::kCuda, sin_);
    const DType output_dtype = call_.float32_output ? DType::kFloat32 : call_.dtype;
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    const std::int64_t padding = call_.padding + call_.output_padding;
    const std::int64_t stride = output_cols() + padding;
    const OnDevice<std::byte> output(
        Device::kCuda,
        to_bytes(spread(std::vector<float>(static_cast<std::size_t>(m_ * output_cols()), kNan), m_,
                        output_cols(), padding, 0),
                 output_dtype));
    const std::vector<float> empty(static_cast<std::size_t>(cache_size()), -7.0F);
    const auto keys = on_device(empty);
    const auto values = on_device(empty);
    DeviceLinearArgs args{
        .input = input.data() + call_.offset * static_cast<std::int64_t>(size_of(call_.dtype)),
        .m = m_,
        .input_stride = k_ + call_.padding,
        .weight = {.shape = problem_.shape, .data = packed.data()},
        .bias = call_.bias ? bias.data() : nullptr,
        .activation = call_.activation,
        .residual = call_.residual ? residual.data() : nullptr,
        .residual_stride = n_ + call_.padding,
        .output = output.data(),
        .output_stride = stride,
        .dtype = call_.dtype,
        .row_scales = call_.row_scales ? row_scales.data() : nullptr,
        .gated = call_.gated,
        .float32_output = call_.float32_output,
        .qkv = call_.qkv,
        .weight_is_ready = call_.weight_is_ready,
        .spread = call_.spread,
        .in_chain = call_.in_chain};
    if (call_.norm != NormKind::kNone) {
      args.norm = {.kind = call_.norm,
                   .weight = norm_weight.data(),
                   .bias = call_.norm_bias ? norm_bias.data() : nullptr,
                   .epsilon = kEpsilon};
    }
    if (call_.qkv.rotary.rotary_dim > 0) {
      args.qkv.rotary.positions = positions.data();
      args.qkv.rotary.cos = cosines.data();
      args.qkv.rotary.sin = sines.data();
    }
    if (call_.cached) {
      args.qkv.pages = {.keys = keys.data(), .values = values.data(), .dtype = call_.dtype};
      args.qkv.cache_rows = cache_rows.data();
    }
    launch(args);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());

    Outcome outcome;
    const std::vector<float> wide = from_bytes(output.read(), output_dtype);
    for (std::int64_t i = 0; i < m_; ++i) {
      for (std::int64_t j = 0; j < stride; ++j) {
        const float value = wide[static_cast<std::size_t>(i * stride + j)];
        if (j < output_cols()) {
          outcome.output.push_back(value);
        } else {
          EXPECT_EQ(value, -7.0F) << "behind row " << i;
        }
      }
    }
    for (const auto* cache : {&keys, &values}) {
      const std::vector<float> held = from_bytes(cache->read(), call_.dtype);
      outcome.output.insert(outcome.output.end(), held.begin(), held.end());
    }
    if (expected_.empty()) {
      expected_ = expected();
    }
    outcome.expected = expected_;
    return outcome;
  }

 private:
  static constexpr float kEpsilon = 1e-5F;

  std::vector<float> rounded(const std::vector<float>& values) const {
    return from_bytes(to_bytes(values, call_.dtype), call_.dtype);
  }
  std::int64_t output_cols() const {
    return call_.cached  ? static_cast<std::int64_t>(call_.qkv.num_heads) * call_.qkv.head_dim
           : call_.gated ? n_ / 2
                         : n_;
  }
  std::int64_t cache_size() const {
    return call_.cached ? kPages * kPageTokens * call_.qkv.num_kv_heads * call_.qkv.head_dim : 0;
  }

  /// A row of the input as it is multiplied. Where float32 may round a normalised number to either
  /// of two neighbours, their distance is the error.
  std::vector<Bounded> multiplied(std::int64_t token) const {
    std::vector<Bounded> row(static_cast<std::size_t>(k_));
    const float* input = input_.data() + token * k_;
    double mean = 0.0;
    double variance = 0.0;
    for (std::int64_t c = 0; c < k_ && call_.norm == NormKind::kLayerNorm; ++c) {
      mean += input[c] / static_cast<double>(k_);
    }
    for (std::int64_t c = 0; c < k_; ++c) {
      variance += (input[c] - mean) * (input[c] - mean) / static_cast<double>(k_);
    }
    const double inverse = 1 / std::sqrt(variance + kEpsilon);
    for (std::int64_t c = 0; c < k_; ++c) {
      const auto col = static_cast<std::size_t>(c);
      if (call_.norm == NormKind::kNone) {
        row[col].value = input[c];
        continue;
      }
      const double scale = inverse * norm_weight_[col];
      const double offset = call_.norm_bias ? norm_bias_[col] : 0.0;
      const double value = (input[c] - mean) * scale + offset;
      const double slack = 0x1p-20 * ((std::fabs(input[c]) + std::fabs(mean)) * std::fabs(scale) +
                                      std::fabs(offset));
      const float low = round_to(static_cast<float>(value - slack), call_.dtype);
      const float high = round_to(static_cast<float>(value + slack), call_.dtype);
      row[col] = {.value = round_to(static_cast<float>(value), call_.dtype),
                  .error = static_cast<double>(high) - low};
    }
    return row;
  }

  /// Before activations and rotations: [m, n].
  std::vector<Bounded> sums() const {
    std::vector<Bounded> result;
    for (std::int64_t i = 0; i < m_; ++i) {
      const std::vector<Bounded> row = multiplied(i);
      for (std::int64_t j = 0; j < n_; ++j) {
        double sum = 0.0;
        double error = 0.0;
        for (std::int64_t c = 0; c < k_; ++c) {
          const double weight = problem_.weight_at(j, c);
          const Bounded& x = row[static_cast<std::size_t>(c)];
          sum += x.value * weight;
          // Tensor cores cut a sum's last bits off instead of rounding them: a few float32 ulps
          // for each of the k / 16 additions of a warp, far below this.
          error += std::fabs(x.value * weight) * 0x1p-18 + x.error * std::fabs(weight);
        }
        const double scale = call_.row_scales ? row_scales_[static_cast<std::size_t>(i)] : 1.0;
        const double bias = call_.bias ? bias_[static_cast<std::size_t>(j)] : 0.0;
        result.push_back({.value = sum * scale + bias,
                          .error = error * scale + std::fabs(bias) * 0x1p-22 + 1e-6});
      }
    }
    return result;
  }

  Bounded rounded_once(Bounded exact) const {
    const DType dtype = call_.float32_output ? DType::kFloat32 : call_.dtype;
    return {.value = exact.value,
            .error = (exact.error + rounding_error(exact.value, dtype)) * 1.01};
  }

  /// The results of a token and rows j and j + 1, the first of them even.
  std::pair<Bounded, Bounded> rotated(std::int64_t token, std::int64_t j, const Bounded& a,
                                      const Bounded& b) const {
    const int half = call_.qkv.rotary.rotary_dim / 2;
    const auto angle = static_cast<std::size_t>(positions_[static_cast<std::size_t>(token)] * half +
                                                j % call_.qkv.head_dim / 2);
    const double c = cos_[angle];
    const double s = sin_[angle];
    const double error = std::fabs(c) * a.error + std::fabs(s) * a.error + std::fabs(s) * b.error +
                         std::fabs(c) * b.error +
                         0x1p-22 * (std::fabs(a.value) + std::fabs(b.value));
    return {{.value = a.value * c - b.value * s, .error = error},
            {.value = b.value * c + a.value * s, .error = error}};
  }

  std::vector<Bounded> expected() const {
    const std::vector<Bounded> before = sums();
    const std::int64_t cols = output_cols();
    std::vector<Bounded> output(static_cast<std::size_t>(m_ * cols));
    std::vector<Bounded> keys(static_cast<std::size_t>(cache_size()), Bounded{-7.0, 0.0});
    std::vector<Bounded> values = keys;
    constexpr double kSlope = 1.2;  // no activation is steeper
    for (std::int64_t i = 0; i < m_; ++i) {
      for (std::int64_t j = 0; j < n_; ++j) {
        const Bounded& sum = before[static_cast<std::size_t>(i * n_ + j)];
        if (call_.qkv.head_dim > 0) {
          if (j % 2 == 0) {
            place(i, j, sum, before[static_cast<std::size_t>(i * n_ + j + 1)], output, keys,
                  values);
          }
          continue;
        }
        Bounded result{.value = exact_activation(call_.activation, sum.value),
                       .error = kSlope * sum.error + 0x1p-21 * std::fabs(sum.value)};
        if (call_.gated) {
          if (j % 2 == 0) {
            const Bounded& up = before[static_cast<std::size_t>(i * n_ + j + 1)];
            result = {.value = result.value * up.value,
                      .error = result.error * (std::fabs(up.value) + up.error) +
                               std::fabs(result.value) * up.error};
            output[static_cast<std::size_t>(i * cols + j / 2)] = rounded_once(result);
          }
          continue;
        }
        result.value += call_.residual ? residual_[static_cast<std::size_t>(i * n_ + j)] : 0.0;
        output[static_cast<std::size_t>(i * cols + j)] = rounded_once(result);
      }
    }
    output.insert(output.end(), keys.begin(), keys.end());
    output.insert(output.end(), values.begin(), values.end());
    return output;
  }

  /// Rows j and j + 1 of q, k or v where they belong.
  void place(std::int64_t token, std::int64_t j, Bounded a, Bounded b, std::vector<Bounded>& output,
             std::vector<Bounded>& keys, std::vector<Bounded>& values) const {
    const DeviceQkvOutput& qkv = call_.qkv;
    const std::int64_t head = j / qkv.head_dim;
    std::int64_t first = j % qkv.head_dim;
    std::int64_t second = first + 1;
    if (head < qkv.num_heads + qkv.num_kv_heads && first < qkv.rotary.rotary_dim) {
      std::tie(a, b) = rotated(token, j, a, b);
      first /= 2;
      second = first + qkv.rotary.rotary_dim / 2;
    }
    std::vector<Bounded>* to = &output;
    std::int64_t begin = token * output_cols() + head * qkv.head_dim;
    if (call_.cached && head >= qkv.num_heads) {
      const std::int64_t row = cache_rows_[static_cast<std::size_t>(token)];
      if (row < 0) {
        return;
      }
      const bool is_key = head < qkv.num_heads + qkv.num_kv_heads;
      to = is_key ? &keys : &values;
      const std::int64_t own = (head - qkv.num_heads) % qkv.num_kv_heads;
      begin = ((row / kPageTokens * qkv.num_kv_heads + own) * kPageTokens + row % kPageTokens) *
              qkv.head_dim;
    }
    (*to)[static_cast<std::size_t>(begin + first)] = rounded_once(a);
    (*to)[static_cast<std::size_t>(begin + second)] = rounded_once(b);
  }

  const LinearProblem& problem_;
  Call call_;
  std::int64_t m_;
  std::int64_t n_;
  std::int64_t k_;
  std::vector<float> input_;
  std::vector<float> bias_;
  std::vector<float> residual_;
  std::vector<float> norm_weight_;
  std::vector<float> norm_bias_;
  std::vector<float> row_scales_;
  std::vector<std::int32_t> positions_;
  std::vector<std::int32_t> cache_rows_;
  std::vector<float> cos_;
  std::vector<float> sin_;
  mutable std::vector<Bounded> expected_;  // once it was asked for
};

inline Outcome multiply(const LinearProblem& problem, const Call& call) {
  return LinearCudaProblem(problem, call).run([](const DeviceLinearArgs& args) {
    cuda::linear(args, nullptr);
  });
}

}  // namespace moq::kernels::testing
