// LayerNorm and RMSNorm of rows, memory-bound: a row is read once and kept in registers.
//
// One to 32 warps take a row. If there are few rows, so many that a thread has about eight
// elements: time goes by in chains of additions then. If there are many, a quarter of that: a
// thread's share of a sum over warps costs it as much as dozens of elements. Rows that do not fit
// into registers are read anew in each pass.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "kernels/common/check.h"
#include "kernels/common/input_rounding_check.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"
#include "kernels/norm.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kMaxWarps = 32;               // of a row
constexpr int kRows = 4;                    // of a block, where a warp takes a row
constexpr int kFewElements = 8;             // of a thread, of one of few rows
constexpr int kManyElements = 32;           // of a thread, of one of many
constexpr std::int64_t kFewThreads = 1024;  // for each multiprocessor
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr std::int64_t kMaxHiddenSize = std::int64_t{1} << 30;
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

// -------------------------------------------------------------------------------- device functions

/// What the statistics of a row are made of: of a warp's numbers their sum, the sum of their
/// squared differences from their mean, that mean, and how many they are.
using Moments = float4;

/// The threads of a row.
struct Team {
  int warps;
  int thread;

  /// combine over all threads, on all of them. `slots` is shared memory for a number per warp.
  template <typename Number, typename Combine>
  __device__ Number reduce(Number value, Number* slots, const Combine& combine) const {
    value = reduce_lanes(value, combine);
    if (warps > 1) {
      share(value, slots);
      const int lane = thread % kWarpSize;
      value = reduce_lanes(lane < warps ? slots[lane] : Number{}, combine);
    }
    return value;
  }

  /// The sum over the lanes of the warp.
  __device__ static float sum_of_lanes(float value) {
    return reduce_lanes(value, [](float a, float b) { return a + b; });
  }

  /// The row's mean and sum of squared differences from it, from what each warp has of its numbers:
  /// one exchange between the warps (Chan, Golub and LeVeque 1983).
  __device__ float2 merge(const Moments& own, float inverse_size, Moments* slots) const {
    if (warps == 1) {
      return {own.z, own.y};
    }
    share(own, slots);
    int lanes = 2;
    while (lanes < warps) {
      lanes *= 2;
    }
    const int lane = thread % lanes;
    const Moments part = lane < warps ? slots[lane] : Moments{};
    const auto sum = [lanes](float value) {
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, distance);
      }
      return value;
    };
    const float mean = sum(part.x) * inverse_size;
    const float difference = part.z - mean;
    return {mean, sum(fmaf(part.w * difference, difference, part.y))};
  }

 private:
  template <typename Number>
  __device__ void share(const Number& value, Number* slots) const {
    if (thread % kWarpSize == 0) {
      slots[thread / kWarpSize] = value;
    }
    __syncthreads();
  }

  template <typename Number, typename Combine>
  __device__ static Number reduce_lanes(Number value, const Combine& combine) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
  }
};

/// Lets the compiler unpack a vector of 16-bit elements anew where it would keep them in twice the
/// registers from one pass to the next.
template <typename Element, int kWidth>
__device__ void stay_packed(Vector<Element, kWidth>& vector) {
  if constexpr (Vector<Element, kWidth>::kPairs) {
#pragma unroll
    for (std::uint32_t& pair : vector.unit) {
      asm volatile("" : "+r"(pair));
    }
  }
}

/// The columns of a norm's weight and bias that belong to a vector.
template <int kWidth>
struct Affine {
  Numbers<kWidth> weight = {};
  Numbers<kWidth> bias = {};

  __device__ void load(const DeviceNorm& norm, int col) {
    if (norm.kind != NormKind::kNone) {
      weight = load_vector<kWidth>(norm.weight + col);
    }
    if (norm.bias != nullptr) {
      bias = load_vector<kWidth>(norm.bias + col);
    }
  }
};

/// A thread's part of a row.
/// @tparam kWidth  elements of a vector
/// @tparam kHeld   vectors that a thread holds in registers; 0: none, they are read in each pass
template <typename Element, int kWidth, int kHeld>
struct Row {
  using Elements = Vector<Element, kWidth>;
  static constexpr int kSlots = std::max(kHeld, 1);

  const Element* input;
  int first;   ///< column of the thread's first vector
  int stride;  ///< columns from one of its vectors to the next
  int size;
  Elements held[kSlots];

  /// Requests what is held of the row.
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * stride < size) {
        held[i] = load_vector<kWidth>(input + first + i * stride);
      }
    }
  }

  /// body(vector, its column, its number in held). What it makes of the vector is kept if held.
  template <typename Body>
  __device__ void for_each_vector(const Body& body) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (first + i * stride < size) {
          stay_packed(held[i]);
          body(held[i], first + i * stride, i);
        }
      }
    } else {
      for (int col = first; col < size; col += stride) {
        held[0] = load_vector<kWidth>(input + col);
        body(held[0], col, 0);
      }
    }
  }

  /// The sum of term(number, sum before) over the thread's part.
  template <typename Term>
  __device__ float sum(const Term& term) {
    float sum = 0.0F;
    for_each_vector([&](const Elements& vector, int, int) {
      const Numbers<kWidth> numbers = numbers_of(vector);
      float part = 0.0F;  // the vectors' sums do not wait for each other
#pragma unroll
      for (const float number : numbers.unit) {
        part = term(number, part);
      }
      sum += part;
    });
    return sum;
  }

  /// Numbers of the row that are with the thread's warp.
  __device__ int size_of_warp() const {
    const int begin = first - static_cast<int>(threadIdx.x) % kWarpSize * kWidth;
    int count = 0;
    for (int col = begin; col < size; col += stride) {
      count += min(size - col, kWarpSize * kWidth);
    }
    return count;
  }
};

/// What the elements of a row have in common.
struct RowStatistics {
  float mean = 0.0F;
  float inverse = 1.0F;  ///< of the deviation
};

template <int kWidth>
__device__ Numbers<kWidth> normalised(Numbers<kWidth> numbers, const Affine<kWidth>& affine,
                                      RowStatistics row) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float standard = (numbers.unit[i] - row.mean) * row.inverse;
    numbers.unit[i] = fmaf(standard, affine.weight.unit[i], affine.bias.unit[i]);
  }
  return numbers;
}

/// What a row's dynamic grid depends on. A row that is held is then the result itself.
/// @param slots  shared memory for two numbers of each warp
template <typename Element, int kWidth, int kHeld, typename Result>
__device__ GroupStatistics grid_statistics(Row<Element, kWidth, kHeld>& row, const Team& team,
                                           QuantMode mode, std::int32_t* slots,
                                           const Result& result) {
  GroupStatistics statistics;
  row.for_each_vector([&](Vector<Element, kWidth>& vector, int col, int i) {
    vector = result(vector, col, i);
    const Numbers<kWidth> numbers = numbers_of(vector);
#pragma unroll
    for (const float number : numbers.unit) {
      const std::int32_t bits = __float_as_int(number);
      if (is_symmetric(mode)) {
        statistics.highest = max(statistics.highest, bits & kMagnitudeMask);
      } else {
        statistics.lowest = min(statistics.lowest, ordered_bits(bits));
        statistics.highest = max(statistics.highest, ordered_bits(bits));
      }
    }
  });
  if (!is_symmetric(mode)) {
    statistics.lowest = team.reduce(statistics.lowest, slots + kMaxWarps,
                                    [](std::int32_t a, std::int32_t b) { return min(a, b); });
  }
  statistics.highest = team.reduce(statistics.highest, slots,
                                   [](std::int32_t a, std::int32_t b) { return max(a, b); });
  return statistics;
}

/// Writes a row of `result` (of a vector, its column and its number) as codes less the zero point.
template <typename Element, int kWidth, int kHeld, typename Result>
__device__ void write_codes(Row<Element, kWidth, kHeld>& row, const Team& team,
                            const GridParams& grid, const Result& result, Element* output,
                            float* scale) {
  using Elements = Vector<Element, kWidth>;
  if (team.thread == 0) {
    *scale = grid.scale;
  }
  // The codes of quantize_one, in float32: to limit first is the same, since the ends are integers,
  // and adding 1.5 * 2^23 rounds to an integer then, +0 included. Comparisons keep a NaN.
  constexpr float kRound = 0x1.8p23F;
  const auto lowest = static_cast<float>(grid.range.qmin - grid.zero_point);
  const auto highest = static_cast<float>(grid.range.qmax - grid.zero_point);
  const bool has_grid = exists(grid);
  row.for_each_vector([&](Elements& vector, int col, int i) {
    vector = result(vector, col, i);
    Numbers<kWidth> numbers = numbers_of(vector);
#pragma unroll
    for (float& number : numbers.unit) {
      const float limited = larger(lowest, smaller(highest, number * grid.inverse_scale));
      number = has_grid ? (limited + kRound) - kRound : 0.0F;
    }
    vector = rounded<Element>(numbers);
    store_vector(output + col, vector);
  });
}

// ------------------------------------------------------------------------------------------ kernel

template <typename Element, int kWidth, int kHeld>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    norm_kernel(DeviceNormArgs args, int warps) {
  using Elements = Vector<Element, kWidth>;
  // Registers for the weight and bias too, which then come with the row.
  constexpr bool kHoldsAffine = kHeld > 0 && kHeld * kWidth <= 2 * kFewElements;
  __shared__ Moments moments[kMaxWarps];
  __shared__ std::int32_t extents[2 * kMaxWarps];
  const Team team{warps, static_cast<int>(warps == 1 ? threadIdx.x % kWarpSize : threadIdx.x)};
  const std::int64_t token =
      warps == 1 ? static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarpSize
                 : blockIdx.x;
  allow_next_kernel();
  // ---- what does not depend on kernels ahead
  Row<Element, kWidth, kHeld> row;
  row.first = team.thread * kWidth;
  row.stride = warps * kWarpSize * kWidth;
  row.size = static_cast<int>(args.hidden_size);
  Affine<kWidth> affine[kHoldsAffine ? kHeld : 1];
  const auto load_affine = [&] {
    if constexpr (kHoldsAffine) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (row.first + i * row.stride < row.size) {
          affine[i].load(args.norm, row.first + i * row.stride);
        }
      }
    }
  };
  if (args.weight_is_ready) {
    load_affine();
  }
  const bool normalises = args.norm.kind != NormKind::kNone;
  const bool centres = args.norm.kind == NormKind::kLayerNorm;
  const float inverse_size = 1.0F / static_cast<float>(row.size);
  const auto warp_size = static_cast<float>(normalises ? row.size_of_warp() : 0);
  const float inverse_warp_size = 1.0F / fmaxf(warp_size, 1.0F);

  wait_for_previous_kernels();
  if (token >= args.num_tokens) {
    return;
  }
  row.input = static_cast<const Element*>(args.input) +
              (args.rows != nullptr ? args.rows[token] : token) * args.input_stride;
  row.load();
  if (!args.weight_is_ready) {
    load_affine();
  }

  RowStatistics statistics;
  if (normalises) {
    float sum = 0.0F;
    float mean = 0.0F;  // of the warp's numbers
    if (centres) {
      sum = Team::sum_of_lanes(row.sum([](float x, float part) { return part + x; }));
      mean = sum * inverse_warp_size;
    }
    const float squares = Team::sum_of_lanes(row.sum([mean](float x, float part) {
      const float difference = x - mean;
      return fmaf(difference, difference, part);
    }));
    const float2 merged = team.merge(Moments{sum, squares, mean, warp_size}, inverse_size, moments);
    statistics.mean = merged.x;
    statistics.inverse = rsqrtf(fmaf(merged.y, inverse_size, args.norm.epsilon));
  }
  const auto unrounded = [&](const Elements& vector, int col, int i) {
    const Numbers<kWidth> numbers = numbers_of(vector);
    if (!normalises) {
      return numbers;
    }
    if constexpr (!kHoldsAffine) {
      affine[0].load(args.norm, col);
    }
    return normalised(numbers, affine[kHoldsAffine ? i : 0], statistics);
  };
  const auto result = [&](const Elements& vector, int col, int i) {
    return normalises ? rounded<Element>(unrounded(vector, col, i)) : vector;
  };
  if (args.float32_output) {
    float* output = static_cast<float*>(args.output) + token * args.output_stride;
    row.for_each_vector([&](const Elements& vector, int col, int i) {
      store_vector(output + col, unrounded(vector, col, i));
    });
    return;
  }
  Element* output = static_cast<Element*>(args.output) + token * args.output_stride;
  if (args.row_scales == nullptr && args.row_extents == nullptr) {
    row.for_each_vector([&](const Elements& vector, int col, int i) {
      store_vector(output + col, result(vector, col, i));
    });
    return;
  }
  if (args.rounding.scale > 0.0F) {
    write_codes(row, team, static_grid(args.rounding), result, output, args.row_scales + token);
    return;
  }
  const QuantMode mode = grid_mode(args.rounding.mode);
  const std::int64_t above = is_symmetric(mode) ? token : args.num_tokens + token;
  GroupStatistics own = grid_statistics(row, team, mode, extents, result);
  if (args.row_extents != nullptr) {
    if (team.thread == 0) {
      const GroupExtents row_extents = extents_of(own, mode);
      args.row_extents[token] = row_extents.below;
      args.row_extents[above] = row_extents.above;
    }
    return;
  }
  if (args.given_extents != nullptr) {
    own = statistics_of(GroupExtents{args.given_extents[token], args.given_extents[above]}, mode);
  }
  const GridParams grid = make_grid(own, 8, mode, DType::kFloat32);
  const auto kept = [&](const Elements& vector, int col, int i) {
    return kHeld > 0 ? vector : result(vector, col, i);
  };
  write_codes(row, team, grid, kept, output, args.row_scales + token);
}

// --------------------------------------------------------------------------------------- launchers

/// The kernel for rows of which a thread has so many vectors.
template <typename Element, int kWidth>
auto kernel_for(std::int64_t vectors) {
  constexpr int kHeld = kFewElements / kWidth;
  if constexpr (kWidth > 1) {
    if (vectors > kHeld && vectors <= 4 * kHeld) {
      return vectors <= 2 * kHeld ? norm_kernel<Element, kWidth, 2 * kHeld>
                                  : norm_kernel<Element, kWidth, 4 * kHeld>;
    }
  }
  return vectors <= kHeld ? norm_kernel<Element, kWidth, kHeld> : norm_kernel<Element, kWidth, 0>;
}

template <typename Element, int kWidth>
void launch_rows(const DeviceNormArgs& args, cudaStream_t stream) {
  const auto warps_for = [&](int elements) {
    return std::min<std::int64_t>(divide_up(args.hidden_size, elements * kWarpSize), kMaxWarps);
  };
  const bool few = args.num_tokens * warps_for(kFewElements) * kWarpSize <=
                   device_limits().multiprocessors * kFewThreads;
  const std::int64_t warps = warps_for(few || kWidth == 1 ? kFewElements : kManyElements);
  const std::int64_t vectors = divide_up(args.hidden_size, kWidth * warps * kWarpSize);
  const std::int64_t blocks = warps == 1 ? divide_up(args.num_tokens, kRows) : args.num_tokens;
  launch(kernel_for<Element, kWidth>(vectors), dim3(static_cast<unsigned>(blocks)),
         dim3(static_cast<unsigned>((warps == 1 ? kRows : warps) * kWarpSize)), 0, stream, args,
         static_cast<int>(warps));
}

template <typename Element>
void launch_rows(const DeviceNormArgs& args, cudaStream_t stream) {
  const std::size_t output_bytes = args.float32_output ? sizeof(float) : sizeof(Element);
  const bool vectors = suits_vectors(args.input) && suits_vectors(args.output) &&
                       suits_vectors(args.norm.weight) && suits_vectors(args.norm.bias) &&
                       suits_vectors(args.hidden_size, sizeof(Element)) &&
                       suits_vectors(args.input_stride, sizeof(Element)) &&
                       suits_vectors(args.output_stride, output_bytes);
  vectors ? launch_rows<Element, kVectorBytes / sizeof(Element)>(args, stream)
          : launch_rows<Element, 1>(args, stream);
}

void check(const DeviceNormArgs& args) {
  MOQ_CHECK(is_float(args.dtype), "norm: dtype must be float16, bfloat16 or float32, got ",
            name_of(args.dtype));
  MOQ_CHECK(args.num_tokens >= 0 && args.num_tokens <= kMaxTokens,
            "norm: num_tokens must be in [0, ", kMaxTokens, "], got ", args.num_tokens);
  MOQ_CHECK(args.hidden_size >= 1 && args.hidden_size <= kMaxHiddenSize,
            "norm: hidden_size must be in [1, ", kMaxHiddenSize, "], got ", args.hidden_size);
  MOQ_CHECK(args.norm.kind == NormKind::kLayerNorm || args.norm.bias == nullptr,
            "norm: only LayerNorm has a bias");
  if (args.num_tokens == 0) {
    return;
  }
  MOQ_CHECK(args.input != nullptr && (args.output != nullptr || args.row_extents != nullptr),
            "norm: input and output must not be null");
  const InputMode mode = args.rounding.mode;
  kernels::check("norm", args.rounding);
  MOQ_CHECK(args.row_extents == nullptr || (args.output == nullptr && args.row_scales == nullptr),
            "norm: row_extents must be written alone, got output or row_scales too");
  MOQ_CHECK(args.row_extents == nullptr || is_dynamic(mode),
            "norm: row_extents need a dynamic INT8 rounding, got ", name_of(mode));
  MOQ_CHECK(
      args.row_extents != nullptr || (args.row_scales != nullptr) == (mode != InputMode::kFloat32),
      "norm: row_scales must come with an INT8 rounding, and only then, got ", name_of(mode),
      args.row_scales != nullptr ? " with row_scales" : " without");
  MOQ_CHECK(!args.float32_output || mode == InputMode::kFloat32,
            "norm: float32_output must be without a rounding, got ", name_of(mode));
  MOQ_CHECK(args.given_extents == nullptr || (args.row_scales != nullptr && is_dynamic(mode)),
            "norm: given_extents need row_scales and a dynamic INT8 rounding, got ", name_of(mode),
            args.row_scales != nullptr ? " with row_scales" : " without");
  MOQ_CHECK(args.norm.kind == NormKind::kNone || args.norm.weight != nullptr,
            "norm: a norm's weight must not be null");
  MOQ_CHECK(args.num_tokens == 1 || args.rows != nullptr || args.input_stride >= args.hidden_size,
            "norm: input_stride must be >= hidden_size, got ", args.input_stride, " and ",
            args.hidden_size);
  MOQ_CHECK(
      args.num_tokens == 1 || args.output == nullptr || args.output_stride >= args.hidden_size,
      "norm: output_stride must be >= hidden_size, got ", args.output_stride, " and ",
      args.hidden_size);
  MOQ_CHECK(args.input != args.output ||
                (args.rows == nullptr &&
                 (args.num_tokens == 1 || args.input_stride == args.output_stride) &&
                 (!args.float32_output || args.dtype == DType::kFloat32)),
            "norm: the output can be the input only with the same rows, stride and dtype");
}

}  // namespace

void norm(const DeviceNormArgs& args, cudaStream_t stream) {
  check(args);
  if (args.num_tokens == 0) {
    return;
  }
  visit_float(args.dtype, [&]<typename Element>(Element) { launch_rows<Element>(args, stream); });
}

}  // namespace moq::kernels::cuda
