#pragma once

#include <cstddef>
#include <string>

#include "kernels/decode_step.h"

/// What a decode step is asked of, checked before anything is launched. Host code.
namespace moq::kernels::cuda::step {

/// What a layer has that decode_step computes no layer with, and what it would be; empty: nothing.
std::string obstacle_in(const DecodeStepShape& shape, const DecodeStepLayer& layer);

/// @param state_bytes  of a step's state
/// @throws moq::Error for a missing or misaligned pointer, pages of another dtype, or memory that
///         overlaps where it must not
void check_args(const DecodeStepArgs& args, std::size_t state_bytes);

}  // namespace moq::kernels::cuda::step
