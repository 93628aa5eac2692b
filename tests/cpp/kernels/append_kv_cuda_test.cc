// What stands between the QKV projection and attention on a GPU, against the definition in float64;
// what is in the cache against what is in the rows, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/common/check.h"
#include "kernels/quant_grid.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

struct Setup {
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  NormKind norm = NormKind::kNone;
  std::int32_t rotary_dim = 0;
  std::int64_t num_tokens = 9;
  std::int64_t padding = 0;  ///< elements between rows
};

using Axes = std::tuple<Setup, DType, bool>;

class AppendKvCuda : public ::testing::TestWithParam<Axes> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

constexpr std::int64_t kPages = 3;
constexpr float kUntouched = -7.0F;

std::vector<double> normalised(std::vector<double> x, NormKind kind, const float* weight,
                               const float* bias, double epsilon) {
  double mean = 0.0;
  double squares = 0.0;
  for (const double value : x) {
    mean += kind == NormKind::kLayerNorm ? value / static_cast<double>(x.size()) : 0.0;
  }
  for (const double value : x) {
    squares += (value - mean) * (value - mean) / static_cast<double>(x.size());
  }
  for (std::size_t i = 0; i < x.size() && kind != NormKind::kNone; ++i) {
    x[i] = (x[i] - mean) / std::sqrt(squares + epsilon) * weight[i] +
           (kind == NormKind::kLayerNorm ? bias[i] : 0.0);
  }
  return x;
}

TEST_P(AppendKvCuda, NormalisesRotatesAndAppends) {
  const auto& [setup, dtype, codes] = GetParam();
  std::mt19937 generator(5);
  std::normal_distribution<float> distribution;
  const auto random = [&](std::int64_t size) {
    std::vector<float> values(static_cast<std::size_t>(size));
    for (float& value : values) {
      value = round_to(distribution(generator), dtype);
    }
    return values;
  };
  const std::int64_t head_dim = setup.head_dim;
  const std::int64_t kv = setup.num_kv_heads;
  const std::int64_t heads = setup.num_heads + 2 * kv;
  const std::int64_t stride = heads * head_dim + setup.padding;
  const std::int64_t half = setup.rotary_dim / 2;
  std::vector<float> rows = random(setup.num_tokens * stride);
  const std::vector<float> weight = random(head_dim);
  const std::vector<float> bias = random(head_dim);
  std::vector<float> cosines;
  std::vector<float> sines;
  for (std::int64_t i = 0; i < 50 * half; ++i) {
    cosines.push_back(std::cos(static_cast<float>(i)));
    sines.push_back(std::sin(static_cast<float>(i)));
  }
  std::vector<std::int32_t> positions;
  std::vector<std::int32_t> cache_rows;
  for (std::int64_t t = 0; t < setup.num_tokens; ++t) {
    positions.push_back(static_cast<std::int32_t>(t * 17 % 50));
    cache_rows.push_back(t % 4 == 2 ? -1 : static_cast<std::int32_t>(t * 61 % (kPages * 64)));
  }

  const DType cache_dtype = codes ? DType::kInt8 : dtype;
  const std::int64_t cache_size = kPages * kv * kPageTokens;
  const auto untouched = [&](std::int64_t size) {
    return std::vector<float>(static_cast<std::size_t>(size), kUntouched);
  };
  const OnDevice<std::byte> rows_dev(Device::kCuda, to_bytes(rows, dtype));
  const OnDevice<float> weight_dev(Device::kCuda, weight);
  const OnDevice<float> bias_dev(Device::kCuda, bias);
  const OnDevice<float> cosines_dev(Device::kCuda, cosines);
  const OnDevice<float> sines_dev(Device::kCuda, sines);
  const OnDevice<std::int32_t> positions_dev(Device::kCuda, positions);
  const OnDevice<std::int32_t> cache_rows_dev(Device::kCuda, cache_rows);
  const OnDevice<std::byte> caches[2] = {
      {Device::kCuda, to_bytes(untouched(cache_size * head_dim), cache_dtype)},
      {Device::kCuda, to_bytes(untouched(cache_size * head_dim), cache_dtype)}};
  const OnDevice<float> scales[2] = {{Device::kCuda, untouched(cache_size)},
                                     {Device::kCuda, untouched(cache_size)}};
  const DeviceNorm norm{setup.norm, weight_dev.data(),
                        setup.norm == NormKind::kLayerNorm ? bias_dev.data() : nullptr, 1e-5F};
  cuda::append_kv(
      {.qkv = rows_dev.data(),
       .token_stride = stride,
       .num_tokens = setup.num_tokens,
       .num_heads = setup.num_heads,
       .num_kv_heads = kv,
       .head_dim = head_dim,
       .query_norm = norm,
       .key_norm = norm,
       .rotary = {setup.rotary_dim, positions_dev.data(), cosines_dev.data(), sines_dev.data()},
       .pages = {caches[0].data(), caches[1].data(), scales[0].data(), scales[1].data(),
                 cache_dtype},
       .cache_rows = cache_rows_dev.data(),
       .dtype = dtype},
      nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  const std::vector<float> result = from_bytes(rows_dev.read(), dtype);

  const double rounding = dtype == DType::kFloat32   ? 0x1p-24
                          : dtype == DType::kFloat16 ? 0x1p-11
                                                     : 0x1p-8;
  for (std::int64_t t = 0; t < setup.num_tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t begin = t * stride + h * head_dim;
      std::vector<double> x(rows.begin() + begin, rows.begin() + begin + head_dim);
      if (h < setup.num_heads + kv) {
        x = normalised(x, setup.norm, weight.data(), bias.data(), 1e-5);
        const std::vector<double> before = x;
        for (std::int64_t i = 0; i < half; ++i) {
          const double cosine = cosines[positions[t] * half + i];
          const double sine = sines[positions[t] * half + i];
          x[i] = before[i] * cosine - before[half + i] * sine;
          x[half + i] = before[half + i] * cosine + before[i] * sine;
        }
      }
      for (std::int64_t i = 0; i < head_dim; ++i) {
        ASSERT_NEAR(result[begin + i], x[i],
                    std::fabs(x[i]) * rounding + 4e-5 * (rounding > 1e-6) + 4e-6)
            << "token " << t << ", head " << h << ", element " << i;
      }
    }
    for (std::int64_t i = heads * head_dim; i < stride; ++i) {
      ASSERT_EQ(result[t * stride + i], rows[t * stride + i]);
    }
  }
  for (int kind = 0; kind < 2; ++kind) {
    std::vector<float> expected = untouched(cache_size * head_dim);
    std::vector<float> expected_scales = untouched(cache_size);
    for (std::int64_t t = 0; t < setup.num_tokens; ++t) {
      for (std::int64_t g = 0; g < kv && cache_rows[t] >= 0; ++g) {
        const float* head = &result[t * stride + (setup.num_heads + kind * kv + g) * head_dim];
        float top = 0.0F;
        for (std::int64_t i = 0; i < head_dim; ++i) {
          top = std::max(top, std::fabs(head[i]));
        }
        const GridParams grid = make_grid(-top, top, 8, QuantMode::kSymmetric, DType::kFloat32);
        const std::int64_t row =
            (cache_rows[t] / kPageTokens * kv + g) * kPageTokens + cache_rows[t] % kPageTokens;
        expected_scales[row] = codes ? grid.scale : kUntouched;
        for (std::int64_t i = 0; i < head_dim; ++i) {
          expected[row * head_dim + i] =
              codes ? static_cast<float>(quantize_one(head[i], grid, Rounding::kNearest, 0.0F))
                    : head[i];
        }
      }
    }
    EXPECT_EQ(from_bytes(caches[kind].read(), cache_dtype), expected);
    EXPECT_EQ(scales[kind].read(), expected_scales);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AppendKvCuda,
    ::testing::Combine(::testing::Values(Setup{1, 1, 1}, Setup{25, 25, 64},
                                         Setup{4, 2, 33, NormKind::kRmsNorm, 16},
                                         Setup{8, 1, 128, NormKind::kRmsNorm, 128, 70},
                                         Setup{6, 3, 80, NormKind::kLayerNorm, 20, 5, 7},
                                         Setup{2, 2, 256, NormKind::kNone, 64},
                                         Setup{2, 1, 96, NormKind::kLayerNorm, 0, 3, 2},
                                         Setup{3, 1, 64, NormKind::kNone, 64, 1}),
                       ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
                       ::testing::Bool()));

class AppendKvCudaTest : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(AppendKvCudaTest, RotatesWithoutACacheAndDoesNothingWithoutTokens) {
  const OnDevice<float> rows(Device::kCuda, {1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F});
  const OnDevice<std::int32_t> positions(Device::kCuda, {1});
  const OnDevice<float> cosines(Device::kCuda, {1.0F, 0.0F});
  const OnDevice<float> sines(Device::kCuda, {0.0F, 1.0F});
  DeviceAppendKvArgs args{.qkv = rows.data(),
                          .token_stride = 6,
                          .num_tokens = 1,
                          .num_heads = 1,
                          .num_kv_heads = 1,
                          .head_dim = 2,
                          .rotary = {2, positions.data(), cosines.data(), sines.data()},
                          .dtype = DType::kFloat32};
  cuda::append_kv(args, nullptr);
  args.num_tokens = 0;
  args.qkv = nullptr;
  cuda::append_kv(args, nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  EXPECT_EQ(rows.read(), (std::vector<float>{-2.0F, 1.0F, -4.0F, 3.0F, 5.0F, 6.0F}));
}

TEST_F(AppendKvCudaTest, AHeadWithANanHasNoGrid) {
  const OnDevice<float> rows(Device::kCuda, {1.0F, 2.0F, NAN, 4.0F, 5.0F, INFINITY});
  const OnDevice<std::int32_t> cache_rows(Device::kCuda, {3});
  const OnDevice<std::int8_t> keys(Device::kCuda, std::vector<std::int8_t>(128, 9));
  const OnDevice<std::int8_t> values(Device::kCuda, std::vector<std::int8_t>(128, 9));
  const OnDevice<float> key_scales(Device::kCuda, std::vector<float>(64));
  const OnDevice<float> value_scales(Device::kCuda, std::vector<float>(64));
  cuda::append_kv(
      {.qkv = rows.data(),
       .token_stride = 6,
       .num_tokens = 1,
       .num_heads = 1,
       .num_kv_heads = 1,
       .head_dim = 2,
       .pages = {keys.data(), values.data(), key_scales.data(), value_scales.data(), DType::kInt8},
       .cache_rows = cache_rows.data(),
       .dtype = DType::kFloat32},
      nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  EXPECT_TRUE(std::isnan(key_scales.read()[3]));
  EXPECT_TRUE(std::isnan(value_scales.read()[3]));
  EXPECT_EQ(keys.read()[6], 0);
  EXPECT_EQ(values.read()[7], 0);
}

TEST_F(AppendKvCudaTest, BadArgumentsAreNamed) {
  const OnDevice<float> memory(Device::kCuda, std::vector<float>(64));
  const auto message = [&](const auto& spoil) {
    DeviceAppendKvArgs args{.qkv = memory.data(),
                            .token_stride = 8,
                            .num_tokens = 2,
                            .num_heads = 2,
                            .num_kv_heads = 1,
                            .head_dim = 2,
                            .dtype = DType::kFloat32};
    spoil(args);
    return error_of([&] { cuda::append_kv(args, nullptr); });
  };
  EXPECT_EQ(message([](auto&) {}), "no error");
  EXPECT_EQ(message([](auto& args) { args.dtype = DType::kInt8; }),
            "append_kv: dtype must be float16, bfloat16 or float32, got int8");
  EXPECT_EQ(message([](auto& args) { args.num_tokens = -1; }),
            "append_kv: num_tokens must be >= 0, got -1");
  EXPECT_EQ(message([](auto& args) { args.token_stride = 7; }),
            "append_kv: token_stride must be >= 8, got 7");
  EXPECT_EQ(message([](auto& args) { args.head_dim = 300; }),
            "append_kv: head_dim must be in [1, 256], got 300");
  EXPECT_EQ(message([](auto& args) { args.rotary.rotary_dim = 3; }),
            "append_kv: rotary_dim must be even and at most head_dim, got 3 and 2");
  EXPECT_EQ(message([](auto& args) { args.key_norm.kind = NormKind::kRmsNorm; }),
            "append_kv: a norm needs weight");
  EXPECT_EQ(message([&](auto& args) {
              args.pages = {memory.data(), memory.data(), nullptr, nullptr, DType::kFloat32};
            }),
            "append_kv: pages need cache_rows");
}

}  // namespace
}  // namespace moq::kernels::testing
