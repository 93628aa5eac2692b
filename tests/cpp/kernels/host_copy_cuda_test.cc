#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/cuda/host_copy.h"
#include "kernels/embedding.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

class HostCopyCuda : public ::testing::Test {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(HostCopyCuda, CopiesTheseBytesAndNoOthers) {
  constexpr std::size_t kBehind = 4;  // words
  for (const std::size_t count : {4, 12, 1020, 1024, 1028, 1'000'004}) {
    const Pinned<std::int32_t> host(count + kBehind);
    std::iota(host.elements().begin(), host.elements().end(), 1);
    const Buffer target(std::vector<std::int32_t>(count + kBehind, -1));
    cuda::copy_from_host(target.data(), host.data(), count * sizeof(std::int32_t), nullptr);
    std::vector<std::int32_t> found(count + kBehind);
    target.copy_to(found);
    std::vector<std::int32_t> expected(host.elements().begin(), host.elements().end());
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(count), kBehind, -1);
    EXPECT_EQ(found, expected) << count << " words";
  }
}

/// Copies rows of a table from the host, and writes these rows.
class CopiedRows : public HostCopyCuda {
 protected:
  static constexpr std::size_t kTokens = 64;
  static constexpr std::size_t kRows = 1000;
  static constexpr std::size_t kHidden = 1024;

  void SetUp() override {
    HostCopyCuda::SetUp();
    if (IsSkipped()) {
      return;
    }
    std::vector<float> table(kRows * kHidden);
    for (std::size_t i = 0; i < table.size(); ++i) {
      table[i] = static_cast<float>(i / kHidden);
    }
    table_.emplace(table);
    rows_.emplace(kTokens * sizeof(std::int32_t));
  }

  struct Step {
    Pinned<std::int32_t> host{kTokens};
    Buffer output{kTokens * kHidden * sizeof(float)};
  };

  void enqueue(const Step& step, cudaStream_t stream) const {
    cuda::copy_from_host(rows_->data(), step.host.data(), kTokens * sizeof(std::int32_t), stream);
    DeviceEmbeddingArgs args{.num_lookups = 1,
                             .output = step.output.data(),
                             .num_tokens = kTokens,
                             .hidden_size = kHidden,
                             .dtype = DType::kFloat32};
    args.lookups[0] = {
        .data = table_->data(), .dtype = DType::kFloat32, .rows = rows_->as<std::int32_t>()};
    cuda::embedding(args, stream);
  }

  /// The rows from `first` on have been written.
  static void expect_rows(const Step& step, std::int32_t first) {
    std::vector<float> found(kTokens * kHidden);
    step.output.copy_to(found);
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_EQ(found[i], static_cast<float>(first) + static_cast<float>(i / kHidden));
    }
  }

 private:
  std::optional<Buffer> table_;
  std::optional<Buffer> rows_;
};

/// Each launch copies what the host wrote last.
TEST_F(CopiedRows, AreThoseThatTheHostWroteLast) {
  const Step step;
  const CapturedGraph graph([&](cudaStream_t stream) { enqueue(step, stream); });
  for (std::int32_t i = 0; i < 50; ++i) {
    std::iota(step.host.elements().begin(), step.host.elements().end(), i);
    graph.launch();
    expect_rows(step, i);
  }
}

/// A copy goes where kernels of the graph ahead may still read.
TEST_F(CopiedRows, AreThoseOfEachOfManyGraphsInAStream) {
  const std::vector<Step> steps(50);
  std::list<CapturedGraph> graphs;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::span<std::int32_t> rows = steps[i].host.elements();
    std::iota(rows.begin(), rows.end(), static_cast<std::int32_t>(i));
    graphs.emplace_back([&](cudaStream_t stream) { enqueue(steps[i], stream); });
  }
  for (const CapturedGraph& graph : graphs) {
    graph.launch(nullptr);
  }
  for (std::size_t i = 0; i < steps.size(); ++i) {
    expect_rows(steps[i], static_cast<std::int32_t>(i));
  }
}

TEST_F(HostCopyCuda, NothingToCopyIsNoError) {
  cuda::copy_from_host(nullptr, nullptr, 0, nullptr);
}

TEST_F(HostCopyCuda, BadArgumentsAreNamed) {
  const Pinned<std::int32_t> host(16);
  const Buffer target(64);
  const auto message = [](void* to, const void* from, std::size_t bytes) {
    return error_of([&] { cuda::copy_from_host(to, from, bytes, nullptr); });
  };
  EXPECT_NE(message(nullptr, host.data(), 16).find("null"), std::string::npos);
  EXPECT_NE(message(target.data(), nullptr, 16).find("null"), std::string::npos);
  EXPECT_NE(message(target.data(), host.data(), 12).find("multiples of 16"), std::string::npos);
  EXPECT_NE(message(target.as<char>() + 4, host.data(), 16).find("multiples of 16"),
            std::string::npos);
  EXPECT_NE(message(target.data(), host.elements().data() + 1, 16).find("multiples of 16"),
            std::string::npos);
  alignas(16) const std::int32_t pageable[4] = {};
  EXPECT_NE(message(target.data(), pageable, 16).find("page-locked"), std::string::npos);
  EXPECT_NE(message(target.data(), target.data(), 16).find("page-locked"), std::string::npos);
}

}  // namespace
}  // namespace moq::kernels::testing
