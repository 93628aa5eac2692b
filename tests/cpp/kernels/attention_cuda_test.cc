// Attention on a GPU against the definition in float64, within the bound of its arithmetic: exact
// products, float32 sums, probabilities and results rounded once.
#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "tests/cpp/kernels/device.h"

#if defined(MOQ_WITH_CUDA)

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/quant_grid.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kUntouched = -7.0F;

enum class Storage { kPacked, kPages, kCodes };

struct Heads {
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
};

struct Lengths {
  std::int32_t num_tokens;
  std::int32_t past;
};

struct Setup {
  Heads heads;
  std::int64_t head_dim;
  DType dtype;
  Storage storage;
  std::vector<Lengths> lengths;
  bool causal = true;
  bool alibi = false;
  float query_scale = 2.0F;
};

/// A ragged batch in device memory. Slots and pages are dealt in a shuffled order, and all memory
/// that no key lies in holds NaN.
class Batch {
 public:
  explicit Batch(const Setup& setup) : setup_(setup) {
    const auto& [num_heads, num_kv_heads] = setup.heads;
    std::vector<std::size_t> order(setup.lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator_);
    sequences_.resize(order.size());
    std::int32_t tokens = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Lengths& lengths = setup.lengths[order[i]];
      const std::int32_t past = setup.storage == Storage::kPacked ? 0 : lengths.past;
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
    if (setup.storage != Storage::kPacked) {
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
    if (setup_.storage == Storage::kPacked) {
      args.packed_keys = rows_dev_->data() + num_heads * setup_.head_dim * size;
      args.packed_values = rows_dev_->data() + (num_heads + num_kv_heads) * setup_.head_dim * size;
      args.packed_stride = width_;
    } else {
      const bool codes = setup_.storage == Storage::kCodes;
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
    cuda::attention(args, nullptr);
    return read();
  }
  std::vector<float> read() const {
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    return from_bytes(output_dev_->read(), setup_.dtype);
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
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(setup_.head_dim)); }
  DType cache_dtype() const {
    return setup_.storage == Storage::kCodes ? DType::kInt8 : setup_.dtype;
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
                  setup_.storage == Storage::kCodes
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
    if (setup_.storage == Storage::kPacked) {
      return {&rows_[(s.token_begin + j) * width_ +
                     (num_heads + kind * num_kv_heads + g) * setup_.head_dim],
              1.0};
    }
    const std::int64_t page = table_[s.slot * table_stride_ + j / kPageTokens];
    const std::int64_t row = (page * num_kv_heads + g) * kPageTokens + j % kPageTokens;
    return {&cache_[kind][row * setup_.head_dim],
            setup_.storage == Storage::kCodes ? scales_[kind][row] : 1.0};
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

  Setup setup_;
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

// ----------------------------------------------------------------------------------- every shape

const std::vector<Lengths> kDecode = {{1, 0},  {1, 1},   {1, 62}, {0, 40}, {1, 63},
                                      {1, 64}, {1, 126}, {0, 0},  {1, 999}};
const std::vector<Lengths> kChunks = {{1, 0},    {2, 0},  {63, 0},  {0, 9},   {64, 64},
                                      {65, 100}, {7, 57}, {127, 0}, {130, 1}, {3, 300}};
const std::vector<Lengths> kFew = {{2, 0}, {1, 63}, {2, 64}, {0, 5}, {2, 510}, {1, 0}};

using Axes = std::tuple<std::int64_t, Heads, DType, Storage>;

class AttentionCuda : public ::testing::TestWithParam<Axes> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  void expect_exact(const std::vector<Lengths>& lengths, bool causal, bool alibi) const {
    const auto& [head_dim, heads, dtype, storage] = GetParam();
    const Batch batch({heads, head_dim, dtype, storage, lengths, causal, alibi});
    const std::vector<float> output = batch.compute();
    batch.expect_exact(output);
    EXPECT_EQ(batch.compute(/*past_is_ready=*/true), output);
  }
};

TEST_P(AttentionCuda, DecodesATokenOfEachSequence) {
  expect_exact(kDecode, true, false);
}

TEST_P(AttentionCuda, TakesFewTokensAtOnce) {
  expect_exact(kFew, true, true);
}

TEST_P(AttentionCuda, TakesChunksOfPrompts) {
  expect_exact(kChunks, true, std::get<Heads>(GetParam()).num_heads % 2 == 0);
}

TEST_P(AttentionCuda, SeesBothDirections) {
  expect_exact(kChunks, false, std::get<Heads>(GetParam()).num_heads == 3);
}

const auto kDTypes = ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32);
const auto kStorages = ::testing::Values(Storage::kPacked, Storage::kPages, Storage::kCodes);

INSTANTIATE_TEST_SUITE_P(Dims, AttentionCuda,
                         ::testing::Combine(::testing::Values(1, 8, 32, 33, 64, 72, 80, 96, 112,
                                                              128, 152, 160, 192, 256),
                                            ::testing::Values(Heads{3, 1}), kDTypes, kStorages));
INSTANTIATE_TEST_SUITE_P(Heads, AttentionCuda,
                         ::testing::Combine(::testing::Values(64),
                                            ::testing::Values(Heads{1, 1}, Heads{25, 25},
                                                              Heads{16, 2}, Heads{6, 2},
                                                              Heads{35, 1}),
                                            kDTypes, kStorages));

// ----------------------------------------------------------------------------------------- rest

class AttentionCudaTest : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(AttentionCudaTest, ManyHeadsOfWideTilesAreRight) {
  for (const std::int64_t head_dim : {32, 64, 80, 96, 128, 152, 256}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      const Batch batch({{36, 36},
                         head_dim,
                         dtype,
                         Storage::kPages,
                         {{129, 0}, {1, 200}, {127, 70}, {140, 0}, {0, 0}, {130, 3}}});
      batch.expect_exact(batch.compute());
    }
  }
}

TEST_F(AttentionCudaTest, PromptsOfManyTilesAreRight) {
  for (const std::int64_t head_dim : {64, 72, 96, 128, 152, 256}) {
    for (const bool causal : {false, true}) {
      const Batch batch({{4, 2},
                         head_dim,
                         DType::kFloat16,
                         Storage::kPages,
                         {{700, 0}, {1, 3}, {190, 515}},
                         causal,
                         /*alibi=*/head_dim == 128});
      batch.expect_exact(batch.compute());
    }
  }
}

TEST_F(AttentionCudaTest, LargeScoresStayFinite) {
  for (const Storage storage : {Storage::kPages, Storage::kCodes}) {
    const Batch batch(
        {{4, 2}, 64, DType::kBFloat16, storage, {{40, 0}, {70, 90}}, true, false, 300.0F});
    for (const float value : batch.compute()) {
      ASSERT_TRUE(std::isfinite(value));
    }
  }
}

TEST_F(AttentionCudaTest, ACapturedLaunchServesAnyLength) {
  Batch batch({{8, 2}, 64, DType::kFloat16, Storage::kPages, {{1, 900}, {1, 700}, {1, 70}}});
  const std::vector<DeviceSequence> whole = batch.sequences();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  MOQ_CUDA_CHECK(cudaStreamCreate(&stream));
  MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  DeviceAttentionArgs args = batch.args();
  cuda::attention(args, stream);
  args.past_is_ready = true;
  cuda::attention(args, stream);
  MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (const std::int32_t shorter : {0, 1, 400, 700}) {
    for (std::size_t i = 0; i < whole.size(); ++i) {
      batch.sequences()[i].past_length = std::max(0, whole[i].past_length - shorter);
    }
    batch.upload_sequences();
    MOQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    batch.expect_exact(batch.read());
  }
  MOQ_CUDA_CHECK(cudaGraphExecDestroy(executable));
  MOQ_CUDA_CHECK(cudaGraphDestroy(graph));
  MOQ_CUDA_CHECK(cudaStreamDestroy(stream));
}

TEST_F(AttentionCudaTest, TheSameBitsEveryTime) {
  const Batch batch({{25, 25}, 64, DType::kFloat16, Storage::kPages, {{1, 511}}});
  const std::vector<float> first = batch.compute();
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(batch.compute(), first);
  }
}

TEST_F(AttentionCudaTest, NothingToComputeWritesNothing) {
  const Batch batch({{2, 1}, 64, DType::kFloat16, Storage::kPages, {{0, 5}, {0, 0}}});
  DeviceAttentionArgs args = batch.args();
  cuda::attention(args, nullptr);
  args.max_tokens = 1;
  cuda::attention(args, nullptr);
  args.max_tokens = 100;
  cuda::attention(args, nullptr);
  args.num_sequences = 0;
  cuda::attention(args, nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
}

TEST_F(AttentionCudaTest, BadArgumentsAreNamed) {
  const Batch batch({{4, 2}, 64, DType::kFloat16, Storage::kCodes, {{1, 5}}});
  const auto message = [&](const auto& spoil) {
    DeviceAttentionArgs args = batch.args();
    spoil(args);
    try {
      cuda::attention(args, nullptr);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message([](auto& args) { args.dtype = DType::kInt8; }),
            "attention: dtype must be float16, bfloat16 or float32, got int8");
  EXPECT_EQ(message([](auto& args) { args.num_kv_heads = 3; }),
            "attention: num_heads must be a multiple of num_kv_heads, got 4 and 3");
  EXPECT_EQ(message([](auto& args) { args.head_dim = 257; }),
            "attention: head_dim must be in [1, 256], got 257");
  EXPECT_EQ(message([](auto& args) { args.scale = 0.0F; }), "attention: scale must be > 0, got 0");
  EXPECT_EQ(message([](auto& args) { args.output = nullptr; }),
            "attention: output must not be null");
  EXPECT_EQ(message([](auto& args) { args.page_table = nullptr; }),
            "attention: pages need a page_table");
  EXPECT_EQ(message([](auto& args) { args.pages.value_scales = nullptr; }),
            "attention: int8 pages need key_scales and value_scales");
  EXPECT_EQ(message([](auto& args) { args.pages.dtype = DType::kFloat32; }),
            "attention: pages must be int8 or float16 as the activations, got float32");
  EXPECT_EQ(message([](auto& args) { args.query_stride = 255; }),
            "attention: query_stride and output_stride must be >= 256, got 255 and 264");
}

}  // namespace
}  // namespace moq::kernels::testing

#endif
