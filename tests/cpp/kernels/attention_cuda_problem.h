#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "kernels/common/parallel.h"
#include "kernels/quant_grid.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/typed_bytes.h"

/// Ragged batches in device memory, and their attention by the definition in float64, within the
/// bound of its arithmetic: exact products, float32 sums, probabilities and results rounded once.
namespace moq::kernels::testing {

enum class KeyStorage { kPacked, kPages, kCodes };

struct HeadCounts {
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
};

struct SequenceLengths {
  std::int32_t num_tokens;
  std::int32_t past;
};

struct AttentionSetup {
  HeadCounts heads;
  std::int64_t head_dim;
  DType dtype;
  KeyStorage storage;
  std::vector<SequenceLengths> lengths;
  bool causal = true;
  bool alibi = false;
  float query_scale = 2.0F;
};

/// A ragged batch in device memory. Slots and pages are dealt in a shuffled order, and all memory
/// that no key lies in holds NaN.
class AttentionBatch {
 public:
  static constexpr float kUntouched = -7.0F;  ///< what memory of the output holds before

  explicit AttentionBatch(const AttentionSetup& setup) : setup_(setup) {
    const auto& [num_heads, num_kv_heads] = setup.heads;
    std::vector<std::size_t> order(setup.lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator_);
    sequences_.resize(order.size());
    std::int32_t tokens = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
      const SequenceLengths& lengths = setup.lengths[order[i]];
      const std::int32_t past = setup.storage == KeyStorage::kPacked ? 0 : lengths.past;
      sequences_[order[i]] = {tokens, lengths.num_tokens, past, static_cast<std::int32_t>(i)};
      tokens += lengths.num_tokens;
      max_tokens_ = std::max<std::int64_t>(max_tokens_, lengths.num_tokens);
    }
    num_tokens_ = tokens;
    width_ = (num_heads + 2 * num_kv_heads) * setup.head_dim + 8;
    output_stride_ = num_heads * setup.head_dim + 8;
    rows_ = random(num_tokens_ * width_, 1.0F);
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
      for (std::int64_t i = 0; i < num_heads * setup.head_dim; ++i) {
        rows_[t * width_ + i] = rounded(rows_[t * width_ + i] * setup.query_scale);
      }
    }
    for (std::int64_t h = 0; h < num_heads; ++h) {
      slopes_.push_back(std::exp2(-0.5F * static_cast<float>(h + 3)));
    }
    if (setup.storage != KeyStorage::kPacked) {
      make_pages();
    }
    upload();
  }

  std::vector<DeviceSequence>& sequences() { return sequences_; }

  DeviceAttentionArgs args() const {
    const auto& [num_heads, num_kv_heads] = setup_.heads;
    const std::size_t size = size_of(setup_.dtype);
    DeviceAttentionArgs args{.query = rows_dev_->data(),
                             .query_stride = width_,
                             .sequences = sequences_dev_->data(),
                             .num_sequences = static_cast<std::int64_t>(sequences_.size()),
                             .max_tokens = max_tokens_,
                             .num_heads = num_heads,
                             .num_kv_heads = num_kv_heads,
                             .head_dim = setup_.head_dim,
                             .causal = setup_.causal,
                             .scale = scale(),
                             .alibi_slopes = setup_.alibi ? slopes_dev_->data() : nullptr,
                             .output = output_dev_->data(),
                             .output_stride = output_stride_,
                             .dtype = setup_.dtype};
    if (setup_.storage == KeyStorage::kPacked) {
      args.packed_keys = rows_dev_->data() + num_heads * setup_.head_dim * size;
      args.packed_values = rows_dev_->data() + (num_heads + num_kv_heads) * setup_.head_dim * size;
      args.packed_stride = width_;
    } else {
      const bool codes = setup_.storage == KeyStorage::kCodes;
      args.pages = {pages_dev_[0]->data(), pages_dev_[1]->data(),
                    codes ? scales_dev_[0]->data() : nullptr,
                    codes ? scales_dev_[1]->data() : nullptr, cache_dtype()};
      args.page_table = table_dev_->data();
      args.page_table_stride = table_stride_;
    }
    return args;
  }

  std::vector<float> compute(bool past_is_ready = false) const {
    DeviceAttentionArgs args = this->args();
    args.past_is_ready = past_is_ready;
    return compute([&] { cuda::attention(args, nullptr); });
  }
  /// What `launch` leaves where nothing was.
  template <typename Launch>
  std::vector<float> compute(const Launch& launch) const {
    const std::vector<std::byte> untouched =
        to_bytes(std::vector<float>(num_tokens_ * output_stride_, kUntouched), setup_.dtype);
    MOQ_CUDA_CHECK(cudaMemcpy(output_dev_->data(), untouched.data(), untouched.size(),
                              cudaMemcpyHostToDevice));
    launch();
    return read();
  }
  std::vector<float> read() const {
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    return from_bytes(output_dev_->read(), setup_.dtype);
  }
  /// Takes the packed rows as they now are on the device, where a projection has written them.
  void take_rows() {
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    rows_ = from_bytes(rows_dev_->read(), setup_.dtype);
  }
  /// Tells the device of changed sequences.
  void upload_sequences() const {
    MOQ_CUDA_CHECK(cudaMemcpy(sequences_dev_->data(), sequences_.data(),
                              sequences_.size() * sizeof(DeviceSequence), cudaMemcpyHostToDevice));
  }

  /// Every number of the output against the definition; what lies between is untouched.
  void expect_exact(const std::vector<float>& output) const {
    const std::int64_t width = setup_.heads.num_heads * setup_.head_dim;
    std::vector<float> expected(output.size(), kUntouched);
    std::vector<float> allowed(output.size(), 0.0F);
    const ThreadScope threads(static_cast<int>(std::max(1U, std::thread::hardware_concurrency())));
    for (const DeviceSequence& sequence : sequences_) {
      const std::int64_t num_heads = setup_.heads.num_heads;
      parallel_for(sequence.num_tokens * num_heads, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
          const auto i = static_cast<std::int32_t>(item / num_heads);
          const std::int64_t h = item % num_heads;
          const std::int64_t place =
              (sequence.token_begin + i) * output_stride_ + h * setup_.head_dim;
          define(sequence, i, h, &expected[place], &allowed[place]);
        }
      });
    }
    for (std::size_t i = 0; i < output.size(); ++i) {
      ASSERT_LE(std::fabs(output[i] - expected[i]), allowed[i])
          << "token " << i / output_stride_ << ", element " << i % output_stride_ << " of " << width
          << ": " << output[i] << ", expected " << expected[i];
      ASSERT_FALSE(std::isnan(output[i]));
    }
  }

 private:
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  float scale() const { return 1.0F / std::sqrt(static_cast<float>(setup_.head_dim)); }
  DType cache_dtype() const {
    return setup_.storage == KeyStorage::kCodes ? DType::kInt8 : setup_.dtype;
  }
  float rounded(float value) const { return round_to(value, setup_.dtype); }
  std::vector<float> random(std::int64_t size, float deviation) {
    std::normal_distribution<float> distribution(0.0F, deviation);
    std::vector<float> values(static_cast<std::size_t>(size));
    std::generate(values.begin(), values.end(), [&] { return rounded(distribution(generator_)); });
    return values;
  }

  void make_pages() {
    const std::int64_t kv_heads = setup_.heads.num_kv_heads;
    std::int32_t pages = 3;  // of nobody
    for (const DeviceSequence& s : sequences_) {
      const auto own =
          static_cast<std::int32_t>((s.past_length + s.num_tokens + kPageTokens - 1) / kPageTokens);
      pages += own;
      table_stride_ = std::max<std::int64_t>(table_stride_, own + 1);
    }
    std::vector<std::int32_t> free(pages);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), generator_);
    table_.assign(sequences_.size() * table_stride_, std::numeric_limits<std::int32_t>::max());
    const std::int64_t rows = pages * kv_heads * kPageTokens;
    const std::int64_t head_dim = setup_.head_dim;
    for (int kind = 0; kind < 2; ++kind) {
      cache_[kind].assign(static_cast<std::size_t>(rows * head_dim), kNan);
      scales_[kind].assign(static_cast<std::size_t>(rows), kNan);
    }
    for (const DeviceSequence& s : sequences_) {
      const std::int32_t keys = s.past_length + s.num_tokens;
      for (std::int32_t j = 0; j < keys; ++j) {
        std::int32_t& page = table_[s.slot * table_stride_ + j / kPageTokens];
        if (j % kPageTokens == 0) {
          page = free.back();
          free.pop_back();
        }
        for (std::int64_t g = 0; g < kv_heads; ++g) {
          const std::int64_t row = (page * kv_heads + g) * kPageTokens + j % kPageTokens;
          for (int kind = 0; kind < 2; ++kind) {
            const std::vector<float> values = random(head_dim, j % 7 == 3 ? 0.02F : 1.0F);
            float top = 0.0F;
            for (const float value : values) {
              top = std::max(top, std::fabs(value));
            }
            const GridParams grid = make_grid(-top, top, 8, QuantMode::kSymmetric, DType::kFloat32);
            scales_[kind][row] = grid.scale;
            for (std::int64_t d = 0; d < head_dim; ++d) {
              cache_[kind][row * head_dim + d] =
                  setup_.storage == KeyStorage::kCodes
                      ? static_cast<float>(quantize_one(values[d], grid, Rounding::kNearest, 0.0F))
                      : values[d];
            }
          }
        }
      }
    }
  }

  void upload() {
    rows_dev_.emplace(Device::kCuda, to_bytes(rows_, setup_.dtype));
    sequences_dev_.emplace(Device::kCuda, sequences_);
    slopes_dev_.emplace(Device::kCuda, slopes_);
    output_dev_.emplace(
        Device::kCuda,
        to_bytes(std::vector<float>(num_tokens_ * output_stride_, kUntouched), setup_.dtype));
    table_dev_.emplace(Device::kCuda, table_);
    for (int kind = 0; kind < 2; ++kind) {
      pages_dev_[kind].emplace(Device::kCuda, to_bytes(cache_[kind], cache_dtype()));
      scales_dev_[kind].emplace(Device::kCuda, scales_[kind]);
    }
  }

  /// Key (kind 0) or value (1) j of a sequence and the factor of its elements.
  std::pair<const float*, double> stored(const DeviceSequence& s, int kind, std::int64_t j,
                                         std::int64_t g) const {
    const auto& [num_heads, num_kv_heads] = setup_.heads;
    if (setup_.storage == KeyStorage::kPacked) {
      return {&rows_[(s.token_begin + j) * width_ +
                     (num_heads + kind * num_kv_heads + g) * setup_.head_dim],
              1.0};
    }
    const std::int64_t page = table_[s.slot * table_stride_ + j / kPageTokens];
    const std::int64_t row = (page * num_kv_heads + g) * kPageTokens + j % kPageTokens;
    return {&cache_[kind][row * setup_.head_dim],
            setup_.storage == KeyStorage::kCodes ? scales_[kind][row] : 1.0};
  }

  /// A head of an output row in float64, and the error that each element may have.
  void define(const DeviceSequence& s, std::int32_t i, std::int64_t h, float* expected,
              float* allowed) const {
    const std::int64_t head_dim = setup_.head_dim;
    const std::int64_t g = h / (setup_.heads.num_heads / setup_.heads.num_kv_heads);
    const std::int64_t position = s.past_length + i;
    const std::int64_t keys = setup_.causal ? position + 1 : s.past_length + s.num_tokens;
    const float* query = &rows_[(s.token_begin + i) * width_ + h * head_dim];
    std::vector<double> scores(keys);
    double top = -std::numeric_limits<double>::infinity();
    double score_error = 0.0;
    for (std::int64_t j = 0; j < keys; ++j) {
      const auto [key, factor] = stored(s, 0, j, g);
      double dot = 0.0;
      double magnitude = 0.0;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        dot += static_cast<double>(query[d]) * key[d];
        magnitude += std::fabs(static_cast<double>(query[d]) * key[d]);
      }
      const double bias =
          setup_.alibi ? slopes_[h] * std::fabs(static_cast<double>(position - j)) : 0.0;
      scores[j] = dot * factor * scale() - bias;
      score_error = std::max(score_error, magnitude * factor * scale() * 0x1p-20 + bias * 0x1p-21);
      top = std::max(top, scores[j]);
    }
    double total = 0.0;
    for (double& score : scores) {
      score = std::exp(score - top);
      total += score;
    }
    const double rounding = setup_.dtype == DType::kFloat32   ? 0x1p-24
                            : setup_.dtype == DType::kFloat16 ? 0x1p-11
                                                              : 0x1p-8;
    const double tiny = setup_.dtype == DType::kFloat16 ? 0x1p-25 : 0.0;
    std::vector<double> sums(head_dim);
    std::vector<double> magnitudes(head_dim);
    std::vector<double> largest(head_dim);
    for (std::int64_t j = 0; j < keys; ++j) {
      const auto [values, factor] = stored(s, 1, j, g);
      for (std::int64_t d = 0; d < head_dim; ++d) {
        const double value = values[d] * factor;
        sums[d] += scores[j] / total * value;
        magnitudes[d] += scores[j] / total * std::fabs(value);
        largest[d] = std::max(largest[d], std::fabs(value));
      }
    }
    for (std::int64_t d = 0; d < head_dim; ++d) {
      expected[d] = static_cast<float>(sums[d]);
      allowed[d] = static_cast<float>(magnitudes[d] * (rounding + 2 * score_error + 0x1p-18) +
                                      std::fabs(sums[d]) * (rounding + 0x1p-23) + tiny +
                                      static_cast<double>(keys) * tiny * largest[d]);
    }
  }

  AttentionSetup setup_;
  std::mt19937 generator_{11};
  std::int64_t num_tokens_ = 0;
  std::int64_t max_tokens_ = 0;
  std::int64_t width_ = 0;
  std::int64_t output_stride_ = 0;
  std::int64_t table_stride_ = 0;
  std::vector<DeviceSequence> sequences_;
  std::vector<float> rows_;
  std::vector<float> slopes_;
  std::vector<float> cache_[2];  // keys, values
  std::vector<float> scales_[2];
  std::vector<std::int32_t> table_;
  std::optional<OnDevice<std::byte>> rows_dev_;
  std::optional<OnDevice<std::byte>> output_dev_;
  std::optional<OnDevice<std::byte>> pages_dev_[2];
  std::optional<OnDevice<float>> scales_dev_[2];
  std::optional<OnDevice<float>> slopes_dev_;
  std::optional<OnDevice<DeviceSequence>> sequences_dev_;
  std::optional<OnDevice<std::int32_t>> table_dev_;
};

}  // namespace moq::kernels::testing
