#pragma once

#include <cstddef>
#include <vector>

#include "kernels/cuda/fake_quantize_vectors.h"
#include "kernels/fake_quantize.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"

/// Problems of fake_quantize_problem.h as the CUDA kernels are given them.
namespace moq::kernels::testing {

/// A problem's memory on the device.
struct DeviceProblem {
  const Problem& problem;
  Buffer input{problem.input};
  Buffer given_absmax{problem.given_absmax};
  Buffer output{problem.blank.output};
  Buffer codes{problem.blank.codes};
  Buffer scales{problem.blank.scales};
  Buffer zero_points{problem.blank.zero_points};

  FakeQuantizeTensor tensor() const {
    FakeQuantizeTensor tensor = problem.tensor(input.data(), output.data(), codes.data(),
                                               scales.data(), zero_points.as<std::int32_t>());
    if (tensor.given_absmax != nullptr) {
      tensor.given_absmax = given_absmax.as<float>();
    }
    return tensor;
  }

  Result result() const {
    Result result = problem.blank;
    output.copy_to(result.output);
    codes.copy_to(result.codes);
    scales.copy_to(result.scales);
    zero_points.copy_to(result.zero_points);
    return result;
  }
};

/// One call for all problems; they share seed and step. with_codes(i): whether those of the i-th
/// are wanted.
template <typename WithCodes>
std::vector<Result> run_all(const std::vector<Problem>& problems, const WithCodes& with_codes) {
  std::vector<DeviceProblem> devices;
  devices.reserve(problems.size());
  std::vector<FakeQuantizeTensor> tensors;
  std::vector<std::int32_t> num_bits;
  std::vector<float> blend_ratio;
  for (const Problem& problem : problems) {
    devices.push_back({problem});
    tensors.push_back(devices.back().tensor());
    if (!with_codes(tensors.size() - 1)) {
      tensors.back().codes = nullptr;
    }
    num_bits.push_back(problem.parameters.num_bits);
    blend_ratio.push_back(problem.parameters.blend_ratio);
  }
  const Buffer num_bits_dev(num_bits);
  const Buffer blend_ratio_dev(blend_ratio);
  const Buffer step_dev(&problems[0].parameters.step, sizeof(std::int64_t));
  const Buffer workspace(cuda::fake_quantize_workspace_size(tensors));
  cuda::fake_quantize({.tensors = tensors,
                       .num_bits = num_bits_dev.as<std::int32_t>(),
                       .blend_ratio = blend_ratio_dev.as<float>(),
                       .seed = problems[0].parameters.seed,
                       .step = step_dev.as<std::int64_t>(),
                       .workspace = workspace.data()},
                      nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<Result> results;
  for (const DeviceProblem& device : devices) results.push_back(device.result());
  return results;
}

inline std::vector<Result> run_all(const std::vector<Problem>& problems) {
  return run_all(problems, [](std::size_t) { return true; });
}

inline Result run(const Problem& problem) {
  return run_all({problem})[0];
}

/// One problem with its call's device memory, for the tests that change that memory.
class Call {
 public:
  explicit Call(const Problem& problem, bool in_place = false, bool with_codes = true)
      : device_{problem}, tensor_(device_.tensor()) {
    if (in_place) {
      tensor_.input = tensor_.output;
    }
    if (!with_codes) {
      tensor_.codes = nullptr;
      EXPECT_TRUE(cuda::takes_vectors(tensor_)) << problem.parameters;
    }
  }

  void enqueue(cudaStream_t stream) {
    cuda::fake_quantize({.tensors = {&tensor_, 1},
                         .num_bits = num_bits_.as<std::int32_t>(),
                         .seed = device_.problem.parameters.seed,
                         .step = step_.as<std::int64_t>(),
                         .skip = skip_.as<float>(),
                         .workspace = workspace_.data()},
                        stream);
  }
  void set_num_bits(std::int32_t num_bits) { set(num_bits_, num_bits); }
  void set_step(std::int64_t step) { set(step_, step); }
  void set_skip(float skip) { set(skip_, skip); }
  Result result() const { return device_.result(); }

 private:
  template <typename Value>
  static void set(const Buffer& buffer, Value value) {
    MOQ_CUDA_CHECK(cudaMemcpy(buffer.data(), &value, sizeof(value), cudaMemcpyHostToDevice));
  }

  DeviceProblem device_;
  FakeQuantizeTensor tensor_;
  Buffer num_bits_{&device_.problem.parameters.num_bits, sizeof(int)};
  Buffer step_{&device_.problem.parameters.step, sizeof(std::int64_t)};
  Buffer skip_{std::vector<float>{0.0F}};
  Buffer workspace_{cuda::fake_quantize_workspace_size({&tensor_, 1})};
};

}  // namespace moq::kernels::testing
