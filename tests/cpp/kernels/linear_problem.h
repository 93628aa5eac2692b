#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/linear.h"

/// Random linear layers for the tests of kernels/linear.h, and the plain definition of their
/// result.
namespace moq::kernels {

/// Memory aligned as packed weights must be.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t size) : storage_(size + 64) {}
  void* data() {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    return storage_.data() + (64 - address % 64) % 64;
  }

 private:
  std::vector<std::byte> storage_;
};

/// A linear layer with everything it needs, held by value.
struct LinearProblem {
  std::int64_t m = 1;
  LinearShape shape;
  std::vector<std::int8_t> codes;         // [n, k], integer formats
  std::vector<float> values;              // [n, k], float formats, representable in the format
  std::vector<float> scales;              // [n, groups]
  std::vector<std::int32_t> zero_points;  // [n, groups], when asymmetric
  std::vector<float> input;               // [m, k]
  std::vector<float> bias;                // [n]
  std::shared_ptr<AlignedBytes> packed;

  /// A layer with random contents; k columns share a scale unless `group_size` says otherwise.
  static LinearProblem random(std::int64_t m, std::int64_t n, std::int64_t k,
                              WeightFormat format = WeightFormat::kInt8,
                              std::int64_t group_size = 0, bool asymmetric = false) {
    LinearProblem problem;
    problem.m = m;
    problem.shape = {.n = n,
                     .k = k,
                     .format = format,
                     .group_size = group_size > 0 ? group_size : k,
                     .asymmetric = asymmetric};
    std::mt19937 random(static_cast<std::uint32_t>(m * 7919 + n * 104729 + k));
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < n * k; ++i) {
      if (is_integer(format)) {
        const int half = 1 << (bits_of(format) - 1);
        problem.codes.push_back(
            static_cast<std::int8_t>(static_cast<int>(random() % (2 * half)) - half));
      } else {
        problem.values.push_back(
            round_to(normal(random), format == WeightFormat::kBFloat16  ? DType::kBFloat16
                                     : format == WeightFormat::kFloat16 ? DType::kFloat16
                                                                        : DType::kFloat32));
      }
    }
    for (std::int64_t i = 0; is_integer(format) && i < n * num_groups(problem.shape); ++i) {
      const int half = 1 << (bits_of(format) - 1);
      problem.scales.push_back(0.001F + 0.01F * std::fabs(normal(random)));
      problem.zero_points.push_back(static_cast<int>(random() % (2 * half)) - half);
    }
    for (std::int64_t i = 0; i < m * k; ++i) {
      problem.input.push_back(normal(random));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      problem.bias.push_back(normal(random));
    }
    problem.pack();
    return problem;
  }

  void pack() {
    packed = std::make_shared<AlignedBytes>(cpu::packed_linear_size(shape));
    cpu::pack_linear(pack_args(weight_data().data()));
  }

  /// The weight in the format's own dtype, [n, k].
  std::vector<std::byte> weight_data() const {
    std::vector<std::byte> bytes;
    const auto append = [&](const auto& element) {
      const auto* first = reinterpret_cast<const std::byte*>(&element);
      bytes.insert(bytes.end(), first, first + sizeof(element));
    };
    for (const std::int8_t code : codes) {
      append(code);
    }
    for (const float value : values) {
      if (shape.format == WeightFormat::kFloat32) {
        append(value);
      } else {
        append(shape.format == WeightFormat::kBFloat16 ? float_to_bfloat16(value)
                                                       : float_to_float16(value));
      }
    }
    return bytes;
  }

  PackLinearArgs pack_args(const void* weight) const {
    return {.shape = shape,
            .weight = weight,
            .row_stride = shape.k,
            .col_stride = 1,
            .scales = scales.data(),
            .zero_points = shape.asymmetric ? zero_points.data() : nullptr,
            .packed = packed->data()};
  }

  /// The mode, on a given grid if it needs one.
  static InputRounding rounding(InputMode mode) {
    return {.mode = mode,
            .scale = is_static(mode) ? 0.02F : 0.0F,
            .zero_point = mode == InputMode::kStaticAsymmetricInt8 ? -37 : 0};
  }

  LinearArgs args(float* output, InputMode mode = InputMode::kFloat32) const {
    return {.input = input.data(),
            .m = m,
            .input_stride = shape.k,
            .weight = {.shape = shape, .data = packed->data()},
            .bias = bias.data(),
            .input_rounding = rounding(mode),
            .output = output,
            .output_stride = shape.n};
  }

  std::vector<float> run(InputMode mode = InputMode::kFloat32) const {
    std::vector<float> output(m * shape.n, std::numeric_limits<float>::quiet_NaN());
    cpu::linear(args(output.data(), mode));
    return output;
  }

  /// The real number that element (row, col) of the weight stands for, without rounding.
  double weight_at(std::int64_t row, std::int64_t col) const {
    if (!is_integer(shape.format)) {
      return values[row * shape.k + col];
    }
    const std::int64_t group = row * num_groups(shape) + col / shape.group_size;
    const int zero_point = shape.asymmetric ? zero_points[group] : 0;
    return static_cast<double>(codes[row * shape.k + col] - zero_point) * scales[group];
  }
};

}  // namespace moq::kernels
