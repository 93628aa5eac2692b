#include "inference/engine/cuda/outside_captures.h"

#include <c10/cuda/CUDAGuard.h>

#include "kernels/common/check.h"

namespace moq::inference::cuda {

void check_not_captured(const c10::cuda::CUDAStream& stream) {
  const c10::cuda::CUDAGuard guard(stream.device());  // whose default stream is asked
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
  }
  MOQ_CHECK(
      error != cudaErrorStreamCaptureImplicit, "engine: a call must come outside of CUDA ",
      "graphs, got one on the default stream of ", stream.device().str(),
      ", which waits for a stream that is being captured: capture a stream that is made with ",
      "cudaStreamNonBlocking, as torch's are");
  MOQ_CHECK(error != cudaSuccess || status == cudaStreamCaptureStatusNone,
            "engine: a call must come outside of CUDA graphs, got one on a stream of ",
            stream.device().str(),
            " that is being captured: call the engine before the capture or after it");
}

OutsideCaptures::OutsideCaptures(at::Device device) {
  check_not_captured(c10::cuda::getCurrentCUDAStream(device.index()));
}

}  // namespace moq::inference::cuda
