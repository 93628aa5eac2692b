#pragma once

#include <cuda_runtime_api.h>

#include <compare>
#include <cstdint>
#include <memory>
#include <utility>

#include "inference/engine/cuda/outside_captures.h"
#include "inference/engine/cuda/step_inputs.h"
#include "kernels/cuda/cuda_check.h"

namespace moq::inference::cuda {

/// A step, captured: the copy of its inputs, all kernels, and while decoding the read-back of the
/// tokens. It serves every batch of the same shape.
class StepGraph {
 public:
  /// What a captured step depends on besides the model.
  struct Key {
    std::uint64_t cache = 0;      ///< PagedKvCache::id; 0: none
    std::int64_t num_tokens = 0;  ///< while decoding those of the bucket
    std::int64_t num_decoding = 0;
    std::int64_t num_longer = 0;
    std::int64_t max_tokens = 0;
    bool all_greedy = false;
    bool one_kernel = false;  ///< for all layers

    auto operator<=>(const Key&) const = default;
  };

  explicit StepGraph(const Key& key)
      : inputs_(std::make_shared<StepInputs>(key.num_tokens, key.num_decoding + key.num_longer,
                                             key.cache == 0 ? 0 : key.num_tokens)) {}

  const std::shared_ptr<StepInputs>& inputs() const { return inputs_; }
  bool captured() const { return executable_ != nullptr; }

  /// Captures what step() launches on the stream; nothing is executed.
  template <typename Step>
  void capture(cudaStream_t stream, const Step& step) {
    // (Other threads of the process, such as c10d's watchdog, may go on with the GPU meanwhile, but
    // a step that takes memory or waits would be captured wrongly: that is an error.)
    const CaptureMode mode(cudaStreamCaptureModeThreadLocal);
    MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      step();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) {
        cudaGraphDestroy(graph);
      }
      (void)cudaGetLastError();  // the capture's, which is over
      throw;
    }
    MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    MOQ_CUDA_CHECK(status);
    executable_.reset(executable);
  }

  void launch(cudaStream_t stream) const {
    MOQ_CUDA_CHECK(cudaGraphLaunch(executable_.get(), stream));
  }

 private:
  struct Destroy {
    void operator()(CUgraphExec_st* executable) const noexcept { cudaGraphExecDestroy(executable); }
  };

  std::shared_ptr<StepInputs> inputs_;
  std::unique_ptr<CUgraphExec_st, Destroy> executable_;
};

}  // namespace moq::inference::cuda
