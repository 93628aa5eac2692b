// AdamW of many tensors. An element of a float32 parameter with a 16-bit gradient moves 26 bytes
// (3 float32 read and written, the gradient read), and nothing else takes time. A thread block
// takes one chunk of one tensor; its threads hold two vectors of 16 bytes of each array in flight.
// float32 arithmetic of kernels/common/adamw_math.h, the CPU's.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/adamw.h"
#include "kernels/common/adamw_check.h"
#include "kernels/common/adamw_math.h"
#include "kernels/common/integer_math.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 2;  // vectors of each array that a thread has in flight
/// Elements of a thread block: whole rounds of its threads for every dtype.
constexpr std::int64_t kChunk = 4096;

/// A launch may carry 32,764 bytes of parameters.
constexpr int kTableSize = 576;
constexpr int kStepsTableSize = 4000;
constexpr std::size_t kMostParameters = 32764;

struct Entry {
  void* parameter;
  const void* gradient;
  void* exp_avg;
  void* exp_avg_sq;
  const float* step;
  std::int64_t size;
  std::int32_t first_chunk;
  bool in_vectors;
};

struct Table {
  Entry entries[kTableSize];
  std::int32_t size;
};
static_assert(sizeof(Table) + sizeof(AdamWStep) <= kMostParameters);

struct StepsTable {
  float* steps[kStepsTableSize];
  std::int32_t size;
};
static_assert(sizeof(StepsTable) + sizeof(void*) <= kMostParameters);

/// The tensor that a chunk belongs to.
__device__ const Entry& entry_of(const Table& table, std::int32_t chunk) {
  int first = 0;
  int last = table.size - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (table.entries[middle].first_chunk <= chunk) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return table.entries[first];
}

template <typename Parameter, typename Gradient>
struct Arrays {
  Parameter* parameter;
  const Gradient* gradient;
  Parameter* exp_avg;
  Parameter* exp_avg_sq;

  __device__ explicit Arrays(const Entry& entry)
      : parameter(static_cast<Parameter*>(entry.parameter)),
        gradient(static_cast<const Gradient*>(entry.gradient)),
        exp_avg(static_cast<Parameter*>(entry.exp_avg)),
        exp_avg_sq(static_cast<Parameter*>(entry.exp_avg_sq)) {}
};

/// kWidth neighbouring elements of a thread.
template <typename Parameter, typename Gradient, int kWidth>
struct Piece {
  Vector<Parameter, kWidth> parameter;
  Vector<Gradient, kWidth> gradient;
  Vector<Parameter, kWidth> exp_avg;
  Vector<Parameter, kWidth> exp_avg_sq;

  __device__ void load(const Arrays<Parameter, Gradient>& from, std::int64_t i) {
    parameter = load_vector<kWidth>(from.parameter + i);
    gradient = load_vector<kWidth>(from.gradient + i);
    exp_avg = load_vector<kWidth>(from.exp_avg + i);
    exp_avg_sq = load_vector<kWidth>(from.exp_avg_sq + i);
  }

  __device__ void update(const AdamWFactors& factors) {
    Numbers<kWidth> parameters = numbers_of(parameter);
    const Numbers<kWidth> gradients = numbers_of(gradient);
    Numbers<kWidth> averages = numbers_of(exp_avg);
    Numbers<kWidth> squares = numbers_of(exp_avg_sq);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const AdamWElement element = updated({parameters.unit[k], averages.unit[k], squares.unit[k]},
                                           gradients.unit[k], factors);
      parameters.unit[k] = element.parameter;
      averages.unit[k] = element.exp_avg;
      squares.unit[k] = element.exp_avg_sq;
    }
    parameter = rounded<Parameter>(parameters);
    exp_avg = rounded<Parameter>(averages);
    exp_avg_sq = rounded<Parameter>(squares);
  }

  __device__ void store(const Arrays<Parameter, Gradient>& to, std::int64_t i) const {
    store_vector(to.parameter + i, parameter);
    store_vector(to.exp_avg + i, exp_avg);
    store_vector(to.exp_avg_sq + i, exp_avg_sq);
  }
};

/// Elements [begin, end), kWidth neighbours a thread at a time; begin is a multiple of kWidth.
/// @return where the rest begins
template <int kWidth, typename Parameter, typename Gradient>
__device__ std::int64_t update_range(const Arrays<Parameter, Gradient>& arrays,
                                     const AdamWFactors& factors, std::int64_t begin,
                                     std::int64_t end) {
  const std::int64_t whole = begin + (end - begin) / kWidth * kWidth;
  constexpr std::int64_t kRound = std::int64_t{kThreads} * kWidth;
  for (std::int64_t i = begin + std::int64_t{threadIdx.x} * kWidth; i < whole;
       i += kAtOnce * kRound) {
    Piece<Parameter, Gradient, kWidth> pieces[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * kRound < whole) {
        pieces[k].load(arrays, i + k * kRound);
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * kRound < whole) {
        pieces[k].update(factors);
        pieces[k].store(arrays, i + k * kRound);
      }
    }
  }
  return whole;
}

template <typename Parameter, typename Gradient>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Table table, const __grid_constant__ AdamWStep step) {
  __shared__ AdamWFactors shared_factors;
  const auto chunk = static_cast<std::int32_t>(blockIdx.x);
  const Entry& entry = entry_of(table, chunk);
  wait_for_previous_kernels();
  if (step.found_inf != nullptr && *step.found_inf != 0.0F) {
    return;
  }
  if (threadIdx.x == 0) {
    shared_factors = factors_of(step, *entry.step);
  }
  __syncthreads();
  const AdamWFactors factors = shared_factors;
  const Arrays<Parameter, Gradient> arrays(entry);
  const std::int64_t begin = (chunk - entry.first_chunk) * kChunk;
  const std::int64_t end = min(begin + kChunk, entry.size);
  constexpr int kWidth = kVectorBytes / sizeof(Parameter);
  const std::int64_t rest =
      entry.in_vectors ? update_range<kWidth>(arrays, factors, begin, end) : begin;
  update_range<1>(arrays, factors, rest, end);
}

/// A launch of its own, behind all that read the steps.
__global__ void add_steps_kernel(const __grid_constant__ StepsTable table, const float* found_inf) {
  wait_for_previous_kernels();
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < table.size && (found_inf == nullptr || *found_inf == 0.0F)) {
    *table.steps[i] += 1.0F;
  }
}

// ------------------------------------------------------------------------------- kernel launchers

bool lies_in_vectors(const AdamWTensor& tensor) {
  return suits_vectors(tensor.parameter) && suits_vectors(tensor.gradient) &&
         suits_vectors(tensor.exp_avg) && suits_vectors(tensor.exp_avg_sq);
}

template <typename Parameter, typename Gradient>
void launch_table(const Table& table, std::int64_t chunks, const AdamWStep& step,
                  cudaStream_t stream) {
  launch(adamw_kernel<Parameter, Gradient>, dim3(static_cast<unsigned>(chunks)), dim3(kThreads), 0,
         stream, table, step);
}

/// The tensors of one pair of dtypes.
template <typename Parameter, typename Gradient>
void launch_alike(std::span<const AdamWTensor> tensors, DType parameter, DType gradient,
                  const AdamWStep& step, cudaStream_t stream) {
  constexpr std::int64_t kMostChunks = std::int64_t{1} << 30;
  Table table{};
  std::int64_t chunks = 0;
  const auto flush = [&] {
    if (chunks > 0) {
      launch_table<Parameter, Gradient>(table, chunks, step, stream);
    }
    table.size = 0;
    chunks = 0;
  };
  for (const AdamWTensor& tensor : tensors) {
    if (tensor.parameter_dtype != parameter || tensor.gradient_dtype != gradient ||
        tensor.size == 0) {
      continue;
    }
    const std::int64_t own = divide_up(tensor.size, kChunk);
    if (table.size == kTableSize || chunks + own > kMostChunks) {
      flush();
    }
    table.entries[table.size++] = {.parameter = tensor.parameter,
                                   .gradient = tensor.gradient,
                                   .exp_avg = tensor.exp_avg,
                                   .exp_avg_sq = tensor.exp_avg_sq,
                                   .step = tensor.step,
                                   .size = tensor.size,
                                   .first_chunk = static_cast<std::int32_t>(chunks),
                                   .in_vectors = lies_in_vectors(tensor)};
    chunks += own;
  }
  flush();
}

void add_steps(std::span<const AdamWTensor> tensors, const float* found_inf, cudaStream_t stream) {
  StepsTable table{};
  while (!tensors.empty()) {
    const std::size_t size = std::min<std::size_t>(tensors.size(), kStepsTableSize);
    for (std::size_t i = 0; i < size; ++i) {
      table.steps[i] = tensors[i].step;
    }
    table.size = static_cast<std::int32_t>(size);
    const auto blocks = static_cast<unsigned>(divide_up(table.size, kThreads));
    launch(add_steps_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, found_inf);
    tensors = tensors.subspan(size);
  }
}

}  // namespace

void adamw(const AdamWArgs& args, cudaStream_t stream) {
  check_adamw(args);
  const AdamWStep step = step_of(args);
  constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const DType parameter : kFloats) {
    for (const DType gradient : kFloats) {
      if (parameter == DType::kFloat32 || parameter == gradient) {
        visit_adamw(
            parameter, gradient, [&]<typename Parameter, typename Gradient>(Parameter, Gradient) {
              launch_alike<Parameter, Gradient>(args.tensors, parameter, gradient, step, stream);
            });
      }
    }
  }
  add_steps(args.tensors, args.found_inf, stream);
}

}  // namespace moq::kernels::cuda
