#pragma once

namespace moq::kernels::cuda {

constexpr int kWarpSize = 32;

}  // namespace moq::kernels::cuda
