#include "kernels/learned_scale.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/common/learned_scale_pieces.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/learned_scale.h"

namespace moq::kernels::cpu {
namespace {

/// Elements that make a range of rows worth handing to a thread.
constexpr std::int64_t kGrainElements = 64 * 1024;
/// Rows of a range where columns are contiguous, so that memory is read in long pieces.
constexpr std::int64_t kGrainRows = 64;
/// Outputs of at least this many bytes are stored past the caches, as those of fake_quantize.
constexpr std::int64_t kStreamBytes = 8 * 1024 * 1024;

void check(const LearnedScale& at, bool has_pointers) {
  check_learned_scale(at, has_pointers);
  MOQ_CHECK(*at.num_bits == 0 ||
                (*at.num_bits >= min_bits(QuantMode::kSymmetric) && *at.num_bits <= kMaxBits),
            "learned_scale: num_bits must be 0 or in [2, ", kMaxBits, "], got ", *at.num_bits);
  MOQ_CHECK(at.blend_ratio == nullptr || (*at.blend_ratio >= 0.0F && *at.blend_ratio <= 1.0F),
            "learned_scale: blend_ratio must be in [0, 1], got ", *at.blend_ratio);
}

/// What is read is written as it is. All elements are neighbours in one order or the other.
void copy(const LearnedScaleCall& call) {
  const FakeQuantizeTensor& matrix = call.matrix;
  const bool rows = has_contiguous_rows(matrix);
  const std::int64_t count = rows ? matrix.rows : matrix.cols;
  const auto element = static_cast<std::int64_t>(size_of(matrix.input_dtype));
  const std::int64_t stride = (rows ? matrix.row_stride : matrix.col_stride) * element;
  const auto bytes = static_cast<std::size_t>((rows ? matrix.cols : matrix.rows) * element);
  for (std::int64_t i = 0; i < count && bytes > 0 && call.output != nullptr; ++i) {
    std::memcpy(static_cast<std::byte*>(call.output) + i * stride,
                static_cast<const std::byte*>(call.input) + i * stride, bytes);
  }
}

void run(const LearnedScaleCall& call, Derivative derivative) {
  if (*call.num_bits == 0) {
    return copy(call);
  }
  const FakeQuantizeTensor& matrix = call.matrix;
  const std::int64_t fitting =
      std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(matrix.cols, 1));
  const std::int64_t grain = has_contiguous_rows(matrix) ? fitting : round_up(fitting, kGrainRows);
  const bool past_caches =
      matrix.rows * matrix.cols * static_cast<std::int64_t>(size_of(matrix.input_dtype)) >=
      kStreamBytes;
  parallel_for(matrix.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(learned_scale_rows, call, derivative, begin, end, past_caches);
  });
}

float sum_of_run(const float* numbers, std::int64_t size) {
  float lanes[kSumLanes] = {};
  for (std::int64_t i = 0; i < size; ++i) {
    lanes[i % kSumLanes] += numbers[i];
  }
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

/// The sum of a group's runs, in place.
float sum_of_runs(float* sums, std::int64_t count) {
  while (count > 1) {
    const std::int64_t runs = divide_up(count, kSummedAtOnce);
    for (std::int64_t run = 0; run < runs; ++run) {
      const std::int64_t first = run * kSummedAtOnce;
      sums[run] = sum_of_run(sums + first, std::min(kSummedAtOnce, count - first));
    }
    count = runs;
  }
  return count == 1 ? *sums : 0.0F;
}

}  // namespace

void learned_scale_gradient(const LearnedScaleGradientArgs& args) {
  check(args.at, args.output != nullptr);
  const FakeQuantizeTensor& matrix = args.at.matrix;
  const std::int64_t groups = num_groups(matrix);
  MOQ_CHECK(args.absmax != nullptr || groups == 0, "learned_scale: absmax must not be null");
  const Runs runs = runs_of(matrix);
  const std::int64_t per_group = matrix.rows == 0 ? 0 : runs.per_group;
  std::vector<float> sums(static_cast<std::size_t>(groups * per_group));
  run({.matrix = matrix,
       .num_bits = args.at.num_bits,
       .blend_ratio = args.at.blend_ratio,
       .input = args.output,
       .input_absmax = nullptr,
       .output = args.weight,
       .sums = sums.data()},
      Derivative::kGradient);
  const LearnedWidth width(*args.at.num_bits, args.at.blend_ratio);
  for (std::int64_t group = 0; group < groups; ++group) {
    args.absmax[group] =
        by_absmax(sum_of_runs(sums.data() + group * per_group, per_group), matrix, group, width);
  }
}

void learned_scale_tangent(const LearnedScaleTangentArgs& args) {
  check(args.at, args.weight != nullptr && args.output != nullptr);
  MOQ_CHECK(args.absmax != nullptr || num_groups(args.at.matrix) == 0,
            "learned_scale: absmax must not be null");
  run({.matrix = args.at.matrix,
       .num_bits = args.at.num_bits,
       .blend_ratio = args.at.blend_ratio,
       .input = args.weight,
       .input_absmax = args.absmax,
       .output = args.output},
      Derivative::kTangent);
}

}  // namespace moq::kernels::cpu
