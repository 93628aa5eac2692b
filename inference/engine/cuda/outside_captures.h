#pragma once

#include <c10/core/Device.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "inference/engine/transformer.h"

namespace moq::inference::cuda {

/// What the calling thread may do while CUDA graphs are being captured, until this ends on the same
/// thread. By default a thread may not wait for a stream, load a kernel or take memory while any
/// thread captures a graph in the global mode: the call fails, and so does that capture.
class CaptureMode {
 public:
  explicit CaptureMode(cudaStreamCaptureMode mode) : other_(mode) { exchange(); }
  ~CaptureMode() { exchange(); }
  CaptureMode(const CaptureMode&) = delete;
  CaptureMode& operator=(const CaptureMode&) = delete;

 private:
  /// (It fails on a broken GPU only, of which the next call tells.)
  void exchange() { (void)cudaThreadExchangeStreamCaptureMode(&other_); }

  cudaStreamCaptureMode other_;
};

/// @throws moq::Error if work that waits for the stream's would become part of a graph
void check_not_captured(const c10::cuda::CUDAStream& stream);

/// Transformer::outside_captures on a GPU.
class OutsideCaptures final : public DeviceScope {
 public:
  explicit OutsideCaptures(at::Device device);

 private:
  CaptureMode mode_{cudaStreamCaptureModeRelaxed};
};

}  // namespace moq::inference::cuda
