#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "csrc/schedule/schedule.h"

namespace moq::trainer {

/// The step counter, bit widths and blend ratios of one device, as tensors in its memory.
///
/// The kernel reads them there and `advance` computes them there, so a step needs no host
/// synchronisation, an overflow known only to the device stops the schedule, and a captured CUDA
/// graph replays across bit drops.
class Control {
 public:
  /// @param blend_steps  one per parameter, in steps, >= 0; see TrainedParameter
  Control(c10::Device device, const std::vector<std::int64_t>& blend_steps);

  /// Takes over one plan per parameter. Widths and ratios follow at the next set_step or advance.
  void set_plan(const std::vector<schedule::BlockPlan>& plans);

  void set_step(std::int64_t step);

  /// Counts one optimizer step, unless `found_inf` ([1] or scalar, on this device) is non-zero.
  void advance(const std::optional<at::Tensor>& found_inf);

  const at::Tensor& step() const { return step_; }          ///< [1], int64
  const at::Tensor& num_bits() const { return num_bits_; }  ///< [num_parameters], int32
  /// [num_parameters], float32; undefined if no parameter blends.
  const at::Tensor& blend_ratio() const { return blend_ratio_; }

 private:
  void refresh();

  at::Tensor step_;
  at::Tensor start_bits_;  // [num_parameters], int32
  at::Tensor drop_steps_;  // [num_parameters, kMaxBits - kMinBits], int64: one entry per lost bit
  at::Tensor num_bits_;
  at::Tensor blend_steps_;  // [num_parameters], int64; undefined if all are 0
  at::Tensor blend_ratio_;
};

}  // namespace moq::trainer
