#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDAGuard.h>

#include <exception>

#include "inference/engine/cuda/outside_captures.h"
#include "inference/engine/cuda/transformer.h"
#include "kernels/common/check.h"

/// What the member functions of CudaTransformer share; for its own source files.
namespace moq::inference::cuda {

/// Makes the caller's stream wait for the model's at the end of the outermost of them.
class CudaTransformer::HandOver final : public DeviceScope {
 public:
  explicit HandOver(CudaTransformer& model)
      : model_(model), caller_(c10::cuda::getCurrentCUDAStream(model.device_.index())) {
    check_not_captured(caller_);  // a callback between two steps may have begun it
    ++model.hand_overs_;
  }
  ~HandOver() override {
    model_.note_failure();
    if (--model_.hand_overs_ > 0 || !model_.failure_.empty()) {
      return;
    }
    try {
      model_.after_.record(model_.stream_);
      model_.after_.block(caller_);
    } catch (const std::exception&) {
      // The GPU broke while this ran, or another thread began to capture the caller's stream, which
      // can't wait then.
      model_.note_failure();
      (void)cudaStreamSynchronize(model_.stream_);
    }
  }

  const c10::cuda::CUDAStream& caller() const { return caller_; }

 private:
  CudaTransformer& model_;
  c10::cuda::CUDAStream caller_;
};

/// Work on the model's device and stream, behind what the caller's stream holds and before what it
/// will get.
class CudaTransformer::OnDevice {
 public:
  explicit OnDevice(CudaTransformer& model) : hand_over_(usable(model)), guard_(model.stream_) {
    if (cudaStreamQuery(hand_over_.caller()) != cudaSuccess) {
      (void)cudaGetLastError();  // for others, a stream that is not ready is no error
      model.before_.record(hand_over_.caller());
      model.before_.block(model.stream_);
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  /// (Others of the process may have broken the GPU.)
  static CudaTransformer& usable(CudaTransformer& model) {
    model.note_failure();
    MOQ_CHECK(model.failure_.empty(), "engine: a GPU engine must be made anew, in a new process, ",
              "after an error of the GPU, got \"", model.failure_, "\" on ", model.device_.str());
    return model;
  }

  HandOver hand_over_;
  c10::cuda::CUDAStreamGuard guard_;
  /// Tensors that are kept may have been made in either mode, and are written in any.
  c10::InferenceMode inference_mode_;
};

/// Runs launch(), the start of a kernel; an error names what was to be computed and where.
template <typename Launch>
void CudaTransformer::launch(const char* what, std::int64_t rows, std::int64_t columns,
                             std::int64_t bytes, const Launch& launch) {
  if (recording_) {
    decode_kernels_.push_back({what, rows, columns, bytes});
  }
  try {
    launch();
  } catch (const Error& error) {
    note_failure();
    moq::detail::fail("engine: ", what, " of ", rows, " x ", columns, " on ", device_.str(), ": ",
                      error.what());
  }
}

/// Captures a step that has run once, on all ranks or on none.
template <typename Run>
void CudaTransformer::capture(StepGraph& graph, const Run& run) {
  try {
    on_all_ranks(*communicator_, "the graph of a step", [&] { graph.capture(stream_, run); });
  } catch (...) {
    drop_graphs();
    throw;
  }
}

/// Bits of a word of DeviceSamplingArgs::seen.
constexpr std::int64_t kHistoryWordBits = 32;

inline at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::kFloat16    ? at::kHalf
         : dtype == DType::kBFloat16 ? at::kBFloat16
                                     : at::kFloat;
}

}  // namespace moq::inference::cuda
