#include "kernels/learned_scale.h"

#include <algorithm>
#include <vector>

#include "kernels/common/learned_scale_pieces.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/fake_quantize_units.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/learned_scale.h"

namespace moq::kernels::cpu {
namespace {

/// Rows of a range where columns are contiguous, so that memory is read in long pieces.
constexpr std::int64_t kGrainRows = 64;

void check(const LearnedScale& point, bool has_pointers) {
  check_learned_scale(point, has_pointers);
  MOQ_CHECK(*point.num_bits == 0 ||
                (*point.num_bits >= min_bits(QuantMode::kSymmetric) && *point.num_bits <= kMaxBits),
            "learned_scale: num_bits must be 0 or in [2, ", kMaxBits, "], got ", *point.num_bits);
  MOQ_CHECK(
      point.blend_ratio == nullptr || (*point.blend_ratio >= 0.0F && *point.blend_ratio <= 1.0F),
      "learned_scale: blend_ratio must be in [0, 1], got ", *point.blend_ratio);
}

/// What a width of 0 leaves to do: what is read is written.
FakeQuantizeTensor copied(const LearnedScaleCall& call) {
  return {.input = call.input,
          .output = call.output,
          .rows = call.matrix.rows,
          .cols = call.matrix.cols,
          .row_stride = call.matrix.row_stride,
          .col_stride = call.matrix.col_stride,
          .input_dtype = call.matrix.input_dtype,
          .output_dtype = call.matrix.input_dtype};
}

void run(const LearnedScaleCall& call, Derivative derivative) {
  const FakeQuantizeTensor& matrix = call.matrix;
  const std::int64_t fitting =
      std::max<std::int64_t>(1, kUnitElements / std::max<std::int64_t>(matrix.cols, 1));
  const std::int64_t grain = rows_are_contiguous(matrix) ? fitting : round_up(fitting, kGrainRows);
  const bool past_caches =
      matrix.rows * matrix.cols * static_cast<std::int64_t>(size_of(matrix.input_dtype)) >=
      kStreamBytes;
  parallel_for(matrix.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    if (*call.num_bits == 0) {
      copy_unit(rows_of(copied(call), begin, end), past_caches);
    } else {
      MOQ_DISPATCH_ISA(learned_scale_rows, call, derivative, begin, end, past_caches);
    }
  });
}

float sum_of_run(const float* numbers, std::int64_t size) {
  float lanes[kSumLanes] = {};
  for (std::int64_t i = 0; i < size; ++i) {
    lanes[i % kSumLanes] += numbers[i];
  }
  return sum_in_halves(lanes);
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
  check(args.point, args.grad_output != nullptr);
  const FakeQuantizeTensor& matrix = args.point.matrix;
  const std::int64_t groups = num_groups(matrix);
  MOQ_CHECK(args.grad_absmax != nullptr || groups == 0,
            "learned_scale: grad_absmax must not be null");
  const Runs runs = runs_of(matrix);
  const std::int64_t per_group = matrix.rows == 0 ? 0 : runs.per_group;
  std::vector<float> sums(static_cast<std::size_t>(groups * per_group));
  run({.matrix = matrix,
       .num_bits = args.point.num_bits,
       .blend_ratio = args.point.blend_ratio,
       .input = args.grad_output,
       .absmax_tangent = nullptr,
       .output = args.grad_weight,
       .sums = sums.data()},
      Derivative::kGradient);
  const LearnedWidth width(*args.point.num_bits, args.point.blend_ratio);
  for (std::int64_t group = 0; group < groups; ++group) {
    args.grad_absmax[group] =
        by_absmax(sum_of_runs(sums.data() + group * per_group, per_group), matrix, group, width);
  }
}

void learned_scale_tangent(const LearnedScaleTangentArgs& args) {
  check(args.point, args.weight_tangent != nullptr && args.output_tangent != nullptr);
  MOQ_CHECK(args.absmax_tangent != nullptr || num_groups(args.point.matrix) == 0,
            "learned_scale: absmax_tangent must not be null");
  run({.matrix = args.point.matrix,
       .num_bits = args.point.num_bits,
       .blend_ratio = args.point.blend_ratio,
       .input = args.weight_tangent,
       .absmax_tangent = args.absmax_tangent,
       .output = args.output_tangent},
      Derivative::kTangent);
}

}  // namespace moq::kernels::cpu
