// Derivatives of learned step sizes over a range of rows, in the two storages that weights have.
// Where rows are contiguous, a vector holds neighbouring columns of one row; where columns are,
// one column of neighbouring rows, each with sums of its own.
#include "kernels/cpu/simd/learned_scale.h"

#include "kernels/common/visit.h"
#include "kernels/cpu/simd/elementwise.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

constexpr int kRowsAtOnce = 64;  // where columns are contiguous: a cache line or more of each
static_assert(kSumLanes % kWidth == 0 && kRowsAtOnce % kWidth == 0);

/// Of the grid by the weight, and by the step size.
struct Slopes {
  F32 weight;
  F32 step;
};

[[gnu::always_inline]] inline Slopes slopes_of(F32 weight, F32 inverse_scale, F32 qmax) {
  const F32 position = weight * inverse_scale;
  const F32 rounded = round_nearest(position);
  const auto inside = absolute(rounded) <= qmax;
  const F32 below = position < F32{} ? -qmax : position;  // or a NaN
  const F32 end = position > F32{} ? qmax : below;
  return {inside ? broadcast(1.0F) : F32{}, inside ? rounded - position : end};
}

/// One call with its elements' type.
template <typename Element, Derivative kDerivative>
class Typed {
 public:
  Typed(const LearnedScaleCall& call, bool past_caches)
      : call_(call),
        matrix_(call.matrix),
        runs_(runs_of(call.matrix)),
        width_(*call.num_bits, call.blend_ratio),
        weight_(static_cast<const Element*>(call.matrix.input)),
        input_(static_cast<const Element*>(call.input)),
        output_(static_cast<Element*>(call.output)),
        past_caches_(past_caches) {}

  /// Rows are contiguous.
  void take_rows(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t g = 0; g < runs_.groups_per_row; ++g) {
        const std::int64_t group = runs_.group_of(row, g);
        const GridParams grid = learned_grid(matrix_, group, width_);
        const float direction = direction_of(group);
        for (std::int64_t i = 0; i < runs_.per_group_row; ++i) {
          const std::int64_t first = i * kSummedAtOnce;
          const std::int64_t size = smallest(kSummedAtOnce, runs_.group_cols - first);
          const std::int64_t at = row * matrix_.row_stride + g * runs_.group_cols + first;
          const float sum = take_run(at, size, grid, direction);
          if constexpr (kDerivative == Derivative::kGradient) {
            call_.sums[row * runs_.per_row + g * runs_.per_group_row + i] = sum;
          }
        }
      }
    }
  }

  /// Columns are contiguous.
  void take_columns(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t row = begin; row < end; row += kRowsAtOnce) {
      const auto count = static_cast<int>(smallest(kRowsAtOnce, end - row));
      for (std::int64_t g = 0; g < runs_.groups_per_row; ++g) {
        Lanes lanes;
        for (int r = 0; r < count; ++r) {
          const std::int64_t group = runs_.group_of(row + r, g);
          const GridParams grid = learned_grid(matrix_, group, width_);
          lanes.qmax = static_cast<float>(grid.range.qmax);
          lanes.inverse_scale[r] = grid.inverse_scale;
          lanes.direction[r] = direction_of(group);
        }
        for (std::int64_t i = 0; i < runs_.per_group_row; ++i) {
          const std::int64_t first = i * kSummedAtOnce;
          const std::int64_t size = smallest(kSummedAtOnce, runs_.group_cols - first);
          take_run_of_rows(row, count, g * runs_.group_cols + first, size, lanes);
          if constexpr (kDerivative == Derivative::kGradient) {
            for (int r = 0; r < count; ++r) {
              call_.sums[(row + r) * runs_.per_row + g * runs_.per_group_row + i] =
                  lanes.sums[0][r];
            }
          }
        }
      }
    }
  }

 private:
  /// What neighbouring rows have each of their own.
  struct Lanes {
    float qmax = 0.0F;
    alignas(64) float inverse_scale[kRowsAtOnce] = {};
    alignas(64) float direction[kRowsAtOnce] = {};
    alignas(64) float sums[kSumLanes][kRowsAtOnce];
  };

  static std::int64_t smallest(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  /// Of the group's step size, times the grid's share.
  float direction_of(std::int64_t group) const {
    return kDerivative == Derivative::kTangent
               ? by_absmax(call_.absmax_tangent[group], matrix_, group, width_)
               : 0.0F;
  }

  /// What belongs to the weight's own slope, and to the part of it that a blend leaves.
  [[gnu::always_inline]] F32 through_weight(F32 input, F32 slope) const {
    const F32 through_grid = input * slope;
    return width_.blend == 0.0F ? through_grid
                                : input * width_.blend + through_grid * width_.grid_share;
  }

  /// Writes `count` elements from `at` on, and returns what they add to the sums.
  template <bool kStream>
  [[gnu::always_inline]] F32 take_vector(std::int64_t at, std::int64_t count, F32 inverse_scale,
                                         F32 qmax, F32 direction) const {
    const Slopes slopes = slopes_of(load_some(weight_ + at, count), inverse_scale, qmax);
    const F32 input = load_some(input_ + at, count);
    if constexpr (kDerivative == Derivative::kGradient) {
      if (output_ != nullptr) {
        store_some<kStream>(output_ + at, through_weight(input, slopes.weight), count);
      }
      return input * slopes.step;
    } else {
      store_some<kStream>(output_ + at,
                          through_weight(input, slopes.weight) + slopes.step * direction, count);
      return F32{};
    }
  }

  template <bool kStream>
  float take_run(std::int64_t at, std::int64_t size, const GridParams& grid,
                 float direction) const {
    const F32 inverse_scale = broadcast(grid.inverse_scale);
    const F32 qmax = broadcast(static_cast<float>(grid.range.qmax));
    const F32 along = broadcast(direction);
    F32 sums[kSumLanes / kWidth] = {};
    std::int64_t i = 0;
    for (; i + kSumLanes <= size; i += kSumLanes) {
      for (int j = 0; j < kSumLanes / kWidth; ++j) {
        sums[j] += take_vector<kStream>(at + i + j * kWidth, kWidth, inverse_scale, qmax, along);
      }
    }
    for (int j = 0; i < size; ++j, i += kWidth) {
      sums[j] += take_vector<false>(at + i, smallest(kWidth, size - i), inverse_scale, qmax, along);
    }
    if constexpr (kDerivative == Derivative::kTangent) {
      return 0.0F;
    }
    float lanes[kSumLanes];
    std::memcpy(lanes, sums, sizeof(lanes));
    return sum_in_halves(lanes);
  }

  float take_run(std::int64_t at, std::int64_t size, const GridParams& grid,
                 float direction) const {
    return may_stream(at) ? take_run<true>(at, size, grid, direction)
                          : take_run<false>(at, size, grid, direction);
  }

  /// Whether whole vectors from there on may be stored past the caches.
  bool may_stream(std::int64_t at) const {
    constexpr std::uintptr_t kAlignment = kWidth * sizeof(Element);
    return past_caches_ && output_ != nullptr &&
           reinterpret_cast<std::uintptr_t>(output_ + at) % kAlignment == 0;
  }

  template <bool kStream>
  [[gnu::always_inline]] void take_column(std::int64_t at, int count, const Lanes& lanes,
                                          float* sums) const {
    const F32 qmax = broadcast(lanes.qmax);
    const auto take = [&](int r, std::int64_t size) MOQ_INLINE_LAMBDA {
      const F32 sum = take_vector<kStream>(at + r, size, load(lanes.inverse_scale + r), qmax,
                                           load(lanes.direction + r));
      store(sums + r, load(sums + r) + sum);
    };
    int r = 0;
    for (; r + kWidth <= count; r += kWidth) {
      take(r, kWidth);
    }
    if (r < count) {
      take(r, count - r);
    }
  }

  /// Leaves the sum of each row in lanes.sums[0].
  void take_run_of_rows(std::int64_t row, int count, std::int64_t col, std::int64_t size,
                        Lanes& lanes) const {
    std::memset(lanes.sums, 0, sizeof(lanes.sums));
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t at = row + (col + i) * matrix_.col_stride;
      float* sums = lanes.sums[i % kSumLanes];
      may_stream(at) ? take_column<true>(at, count, lanes, sums)
                     : take_column<false>(at, count, lanes, sums);
    }
    for (int half = kSumLanes / 2; kDerivative == Derivative::kGradient && half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        for (int r = 0; r < kRowsAtOnce; r += kWidth) {
          float* sums = lanes.sums[lane] + r;
          store(sums, load(sums) + load(lanes.sums[lane + half] + r));
        }
      }
    }
  }

  const LearnedScaleCall& call_;
  const FakeQuantizeTensor& matrix_;
  Runs runs_;
  LearnedWidth width_;
  const Element* weight_;
  const Element* input_;
  Element* output_;
  bool past_caches_;
};

template <typename Element, Derivative kDerivative>
void take(const LearnedScaleCall& call, std::int64_t begin, std::int64_t end, bool past_caches) {
  const Typed<Element, kDerivative> typed(call, past_caches);
  rows_are_contiguous(call.matrix) ? typed.take_rows(begin, end) : typed.take_columns(begin, end);
  if (past_caches) {
    fence_streams();
  }
}

}  // namespace

void learned_scale_rows(const LearnedScaleCall& call, Derivative derivative, std::int64_t begin,
                        std::int64_t end, bool past_caches) {
  visit_float(call.matrix.input_dtype, [&]<typename Element>(Element) {
    derivative == Derivative::kGradient
        ? take<Element, Derivative::kGradient>(call, begin, end, past_caches)
        : take<Element, Derivative::kTangent>(call, begin, end, past_caches);
  });
}

}  // namespace moq::kernels::cpu::MOQ_ISA
