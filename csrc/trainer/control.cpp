#include "csrc/trainer/control.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/le.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "kernels/quant_grid.h"

namespace moq::trainer {

namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
/// Stands for the step of a drop that has not come: so long ago that no blend reaches from it.
constexpr std::int64_t kLongAgo = -(std::int64_t{1} << 60);

}  // namespace

Control::Control(c10::Device device, const std::vector<std::int64_t>& blend_steps) {
  const auto num_parameters = static_cast<std::int64_t>(blend_steps.size());
  const auto options = at::TensorOptions(device);
  step_ = at::zeros({1}, options.dtype(at::kLong));
  start_bits_ = at::zeros({num_parameters}, options.dtype(at::kInt));
  drop_steps_ = at::full({num_parameters, kMaxBits - kMinBits}, kNever, options.dtype(at::kLong));
  num_bits_ = at::zeros({num_parameters}, options.dtype(at::kInt));
  if (std::ranges::any_of(blend_steps, [](std::int64_t steps) { return steps > 0; })) {
    blend_steps_ = at::tensor(blend_steps, at::kLong).to(device);
    blend_ratio_ = at::zeros({num_parameters}, options.dtype(at::kFloat));
  }
}

void Control::set_plan(const std::vector<schedule::BlockPlan>& plans) {
  at::Tensor start_bits = at::zeros(start_bits_.sizes(), at::kInt);
  at::Tensor drop_steps = at::full(drop_steps_.sizes(), kNever, at::kLong);
  auto starts = start_bits.accessor<std::int32_t, 1>();
  auto drops = drop_steps.accessor<std::int64_t, 2>();
  for (std::size_t p = 0; p < plans.size(); ++p) {
    const auto row = static_cast<std::int64_t>(p);
    const int first = plans[p].front().bits;
    starts[row] = first;
    for (std::size_t d = 1; d < plans[p].size(); ++d) {
      for (int lost = first - plans[p][d - 1].bits; lost < first - plans[p][d].bits; ++lost) {
        drops[row][lost] = plans[p][d].step;
      }
    }
  }
  start_bits_.copy_(start_bits);
  drop_steps_.copy_(drop_steps);
}

void Control::set_step(std::int64_t step) {
  step_.fill_(step);
  refresh();
}

void Control::advance(const std::optional<at::Tensor>& found_inf) {
  if (found_inf) {
    step_.add_(found_inf->eq(0));
  } else {
    step_.add_(1);
  }
  refresh();
}

void Control::refresh() {
  const at::Tensor passed = drop_steps_.le(step_);  // [num_parameters, kMaxBits - kMinBits]
  at::sub_out(num_bits_, start_bits_, passed.sum(1, /*keepdim=*/false, at::kInt));
  if (blend_ratio_.defined()) {
    const at::Tensor last_drop = at::where(passed, drop_steps_, kLongAgo).amax(1);
    const at::Tensor steps_left = last_drop.add(blend_steps_).sub(step_);
    blend_ratio_.copy_(steps_left.div(blend_steps_.clamp_min(1)).clamp(0, 1));
  }
}

}  // namespace moq::trainer
