#include "csrc/trainer/trainer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <span>
#include <sstream>
#include <utility>

#include "csrc/ops/quantizer.h"
#include "kernels/common/check.h"

namespace moq::trainer {
namespace {

std::string layout_words(at::IntArrayRef sizes, at::IntArrayRef strides) {
  std::ostringstream words;
  words << "shape " << sizes << " and strides " << strides;
  return words.str();
}

/// Whether strides lead to the same elements: those of dimensions of one element lead nowhere.
bool same_steps(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a[d] != b[d]) {
      return false;
    }
  }
  return true;
}

/// Bytes of a tensor's storage up to the end of its last element.
std::size_t bytes_reached(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return 0;
  }
  std::int64_t last = tensor.storage_offset();
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return static_cast<std::size_t>(last + 1) * tensor.itemsize();
}

/// A schedule may plan widths for which there is no grid.
void check_widths(const TrainedParameter& parameter, const schedule::Schedule& schedule) {
  for (const schedule::Drop& drop : schedule.plan()[static_cast<std::size_t>(parameter.block)]) {
    const int least = min_bits(parameter.mode);
    MOQ_CHECK(drop.bits >= least && drop.bits <= kMaxBits, "Trainer: the widths planned for ",
              parameter.name, " must lie in [", least, ", ", kMaxBits, "] bits, got ", drop.bits,
              " at step ", drop.step, ": set start_bits and target_bits of its block within them");
  }
}

}  // namespace

Trainer::Trainer(std::vector<TrainedParameter> parameters, schedule::Schedule schedule,
                 std::uint64_t seed, std::int64_t step, bool in_place)
    : parameters_(std::move(parameters)),
      schedule_(std::move(schedule)),
      seed_(seed),
      in_place_(in_place),
      steps_asked_(step),
      versions_(parameters_.size()),
      parameter_versions_(parameters_.size()),
      addresses_(parameters_.size()) {
  for (const TrainedParameter& parameter : parameters_) {
    layouts_.push_back({parameter.simulated.sizes().vec(), parameter.simulated.strides().vec()});
  }
  std::vector<std::pair<c10::Device, std::vector<std::size_t>>> devices;
  for (std::size_t p = 0; p < parameters_.size(); ++p) {
    const TrainedParameter& parameter = parameters_[p];
    MOQ_CHECK(parameter.block >= 0 && parameter.block < schedule_.num_blocks(),
              "Trainer: block of ", parameter.name, " must lie in [0, ", schedule_.num_blocks(),
              "), got ", parameter.block);
    check_widths(parameter, schedule_);
    check_memory(parameter);
    MOQ_CHECK(!parameter.collected.defined() ||
                  (parameter.collected.scalar_type() == at::kLong &&
                   parameter.collected.numel() == kCollectionWords &&
                   parameter.collected.is_contiguous() &&
                   parameter.collected.device() == parameter.simulated.device() &&
                   parameter.granularity == kernels::Granularity::kPerTensor),
              "Trainer: collected of ", parameter.name, " must be int64 [", kCollectionWords,
              "] on its device, of a parameter with one scale");
    const c10::Device device = parameter.simulated.device();
    auto entry = std::ranges::find(devices, device, &decltype(devices)::value_type::first);
    if (entry == devices.end()) {
      entry = devices.insert(devices.end(), {device, {}});
    }
    entry->second.push_back(p);
  }
  if (devices.empty()) {
    devices.emplace_back(c10::kCPU, std::vector<std::size_t>{});  // time passes all the same
  }
  for (auto& [device, members] : devices) {
    std::vector<std::int64_t> blend_steps;
    for (const std::size_t p : members) {
      blend_steps.push_back(parameters_[p].blend_steps);
    }
    DeviceGroup group{.members = std::move(members),
                      .control = Control(device, blend_steps),
                      .step_on_host = at::empty(
                          {1}, at::TensorOptions(at::kLong).pinned_memory(device.is_cuda()))};
    std::vector<std::int64_t> places;
    for (std::size_t index = 0; index < group.members.size(); ++index) {
      const std::size_t p = group.members[index];
      if (parameters_[p].collected.defined()) {
        group.sharing.push_back(p);
        group.collected.push_back(parameters_[p].collected);
        places.push_back(static_cast<std::int64_t>(index));
      }
    }
    // Here and not at each step: the copy waits for the device.
    group.sharing_index = at::tensor(places, at::kLong).to(device);
    set_plan(group);
    group.control.set_step(step);
    group.step_on_host.fill_(step);
    groups_.push_back(std::move(group));
  }
}

void Trainer::begin_step(bool cast) {
  const at::NoGradGuard no_grad;
  if (!in_place_) {
    return;  // the optimizer works on the parameters themselves
  }
  std::vector<at::Tensor> gradients;
  std::vector<at::Tensor> casts;
  for (TrainedParameter& parameter : parameters_) {
    const at::Tensor& gradient = parameter.parameter.grad();
    if (!gradient.defined()) {
      continue;
    }
    TORCH_CHECK_VALUE(gradient.layout() == at::kStrided, "Trainer: the gradient of ",
                      parameter.name, " must be dense, got ", gradient.layout(),
                      "; exclude it by a rule, or use sparse=False in its module");
    const at::ScalarType master_dtype = parameter.master.scalar_type();
    const bool taken =
        !cast && master_dtype == at::kFloat && c10::isReducedFloatingType(gradient.scalar_type());
    if (taken || gradient.scalar_type() == master_dtype) {
      parameter.master.mutable_grad() = gradient;
    } else if (gradient.key_set().has(c10::DispatchKey::Python)) {
      parameter.master.mutable_grad() = gradient.to(master_dtype);  // DTensor has no _foreach_copy_
    } else {
      gradients.push_back(gradient);
      casts.push_back(at::empty_like(gradient, master_dtype));
      parameter.master.mutable_grad() = casts.back();
    }
  }
  if (!casts.empty()) {
    at::_foreach_copy_(casts, gradients);
  }
}

void Trainer::end_step(const std::optional<at::Tensor>& found_inf) {
  abandon_step();
  // A skipped step need not write what is there already. Adopted masters are not.
  const bool must_write = std::exchange(adopted_, false);
  ++steps_asked_;
  for (DeviceGroup& group : groups_) {
    const at::Tensor& step = group.control.step();
    std::optional<at::Tensor> found;
    if (found_inf) {
      found = found_inf->to(step.device());
    }
    group.control.advance(found);
    fake_quantize(group, must_write ? std::nullopt : found);
    group.step_on_host.copy_(step, /*non_blocking=*/true);
  }
}

void Trainer::abandon_step() {
  if (!in_place_) {
    return;
  }
  for (TrainedParameter& parameter : parameters_) {
    parameter.master.mutable_grad().reset();
  }
}

void Trainer::write_simulated() {
  check_layouts();
  shows_masters_ = false;
  adopted_ = false;
  for (const DeviceGroup& group : groups_) {
    fake_quantize(group, std::nullopt);
  }
}

void Trainer::write_masters() {
  if (!in_place_) {
    return;
  }
  check_layouts();
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> targets;
  std::vector<at::Tensor> sources;
  for (const TrainedParameter& parameter : parameters_) {
    targets.push_back(parameter.simulated);
    sources.push_back(parameter.full_precision);
  }
  if (!targets.empty()) {
    at::_foreach_copy_(targets, sources);
  }
  shows_masters_ = true;
  for (std::size_t p = 0; p < parameters_.size(); ++p) {
    record_written(p);
  }
}

void Trainer::check_layouts() const {
  const char* const kept = in_place_
                               ? "The masters are as they were, and state_dict() still gives them"
                               : "It is its own master";
  for (std::size_t p = 0; p < parameters_.size(); ++p) {
    const at::Tensor& simulated = parameters_[p].simulated;
    const auto& [sizes, strides] = layouts_[p];
    MOQ_CHECK(
        simulated.sizes() == sizes && same_steps(sizes, simulated.strides(), strides),
        "MoQOptimizer: ", parameters_[p].name,
        " must keep the layout that it had when MoQOptimizer was made, ",
        layout_words(sizes, strides), ", got ",
        layout_words(simulated.sizes(), simulated.strides()),
        ": copy other values into its memory (parameter.data.copy_(values)) instead of giving "
        "it another (parameter.data = values); for another shape make a new MoQOptimizer. ",
        kept);
    const std::size_t present = simulated.storage().nbytes();
    MOQ_CHECK(bytes_reached(simulated) <= present, "MoQOptimizer: the memory of ",
              parameters_[p].name, " must hold its ", bytes_reached(simulated), " bytes, got ",
              present, ": somebody has resized its storage. ", kept);
  }
}

bool Trainer::was_written(std::size_t parameter) const {
  const TrainedParameter& trained = parameters_[parameter];
  return trained.simulated._version() != versions_[parameter] ||
         trained.parameter._version() != parameter_versions_[parameter];
}

bool Trainer::touched() const {
  for (std::size_t p = 0; in_place_ && p < parameters_.size(); ++p) {
    if (was_written(p)) {
      return true;
    }
  }
  return false;
}

std::vector<std::int64_t> Trainer::overwritten() const {
  check_layouts();
  const at::NoGradGuard no_grad;
  std::vector<std::int64_t> changed;
  if (!in_place_) {
    return changed;  // whatever the parameters hold are the masters
  }
  for (const DeviceGroup& group : groups_) {
    for (std::size_t index = 0; index < group.members.size(); ++index) {
      const std::size_t p = group.members[index];
      const at::Tensor& simulated = parameters_[p].simulated;
      if (!was_written(p) && simulated.const_data_ptr() == addresses_[p]) {
        continue;
      }
      // Many tools write a parameter's own value back (a DDP broadcast, a weight swap that ended).
      if (!at::equal(simulated, expected_value(group, index))) {
        changed.push_back(static_cast<std::int64_t>(p));
      }
    }
  }
  return changed;
}

std::optional<int> Trainer::grid_width(std::int64_t parameter) const {
  const TrainedParameter& checked = parameters_.at(static_cast<std::size_t>(parameter));
  const at::Tensor snapped = at::empty_like(checked.simulated);
  kernels::FakeQuantizeTensor tensor = describe(checked);
  tensor.input = checked.simulated.const_data_ptr();
  tensor.input_dtype = tensor.output_dtype;
  tensor.output = snapped.mutable_data_ptr();
  tensor.rounding = Rounding::kNearest;
  tensor.collected = nullptr;  // that is of the masters
  for (int num_bits = min_bits(checked.mode); num_bits <= kMaxBits; ++num_bits) {
    const at::Tensor width = at::full({1}, num_bits, snapped.options().dtype(at::kInt));
    ops::run_fake_quantize(
        {.tensors = std::span(&tensor, 1), .num_bits = width.const_data_ptr<std::int32_t>()},
        snapped.device());
    if (at::equal(snapped, checked.simulated)) {
      return num_bits;
    }
  }
  return std::nullopt;
}

void Trainer::adopt(const std::vector<std::int64_t>& changed) {
  const at::NoGradGuard no_grad;
  for (const std::int64_t parameter : changed) {
    TrainedParameter& adopted = parameters_.at(static_cast<std::size_t>(parameter));
    adopted.full_precision.copy_(adopted.simulated);
    adopted_ = true;
  }
  for (std::size_t p = 0; p < parameters_.size(); ++p) {
    record_written(p);
  }
}

void Trainer::rebind(const std::vector<at::Tensor>& simulated,
                     const std::vector<at::Tensor>& full_precision) {
  MOQ_CHECK(simulated.size() == parameters_.size() && full_precision.size() == parameters_.size(),
            "Trainer: rebind must get ", parameters_.size(), " pairs of tensors, got ",
            simulated.size(), " and ", full_precision.size());
  for (std::size_t p = 0; p < parameters_.size(); ++p) {
    parameters_[p].simulated = simulated[p];
    parameters_[p].full_precision = full_precision[p];
    check_memory(parameters_[p]);
  }
  check_layouts();
}

void Trainer::set_sensitivities(std::vector<double> sensitivities) {
  const std::int64_t now = step();
  schedule_.set_sensitivities(now, std::move(sensitivities));
  steps_asked_ = now;
  for (DeviceGroup& group : groups_) {
    set_plan(group);
    group.control.set_step(now);
  }
}

void Trainer::restore(schedule::Schedule schedule, std::int64_t step) {
  MOQ_CHECK(schedule.num_blocks() == schedule_.num_blocks(), "Trainer: the schedule must have ",
            schedule_.num_blocks(), " blocks, got ", schedule.num_blocks());
  for (const TrainedParameter& parameter : parameters_) {
    check_widths(parameter, schedule);
  }
  schedule_ = std::move(schedule);
  steps_asked_ = step;
  for (DeviceGroup& group : groups_) {
    set_plan(group);
    group.control.set_step(step);
    group.step_on_host.fill_(step);
  }
}

std::int64_t Trainer::step() const {
  return groups_.front().control.step().item<std::int64_t>();
}

std::int64_t Trainer::step_seen() const {
  return *groups_.front().step_on_host.const_data_ptr<std::int64_t>();
}

std::optional<std::int64_t> Trainer::next_drop(std::int64_t step) const {
  std::optional<std::int64_t> next;
  for (const schedule::BlockPlan& plan : schedule_.plan()) {
    const auto drop =
        std::ranges::find_if(plan, [&](const schedule::Drop& d) { return d.step > step; });
    if (drop != plan.end() && (!next || drop->step < *next)) {
      next = drop->step;
    }
  }
  return next;
}

std::int64_t Trainer::step_at_most() const {
  return std::max(steps_asked_, step_seen());
}

Trainer::OnDevice Trainer::control_of(std::int64_t parameter) const {
  const auto wanted = static_cast<std::size_t>(parameter);
  for (const DeviceGroup& group : groups_) {
    const auto found = std::ranges::find(group.members, wanted);
    if (found != group.members.end()) {
      const auto index = static_cast<std::int64_t>(found - group.members.begin());
      const Control& control = group.control;
      return {control.num_bits().narrow(0, index, 1),
              control.blend_ratio().defined() ? control.blend_ratio().narrow(0, index, 1)
                                              : at::Tensor(),
              control.step()};
    }
  }
  MOQ_CHECK(false, "Trainer: there is no parameter ", parameter);
}

void Trainer::check_memory(const TrainedParameter& parameter) const {
  const at::Tensor& simulated = parameter.simulated;
  const at::Tensor& full_precision = parameter.full_precision;
  TORCH_CHECK_VALUE(simulated.dim() == 2, "Trainer: ", parameter.name,
                    " must have 2 dimensions, got ", simulated.dim());
  TORCH_CHECK_VALUE(simulated.sizes() == full_precision.sizes() &&
                        simulated.strides() == full_precision.strides() &&
                        simulated.device() == full_precision.device(),
                    "Trainer: master and parameter of ", parameter.name,
                    " must have the same shape, strides and device, got ", full_precision.sizes(),
                    ", ", full_precision.strides(), ", ", full_precision.device(), " and ",
                    simulated.sizes(), ", ", simulated.strides(), ", ", simulated.device());
}

void Trainer::set_plan(DeviceGroup& group) const {
  std::vector<schedule::BlockPlan> plans;
  for (const std::size_t p : group.members) {
    plans.push_back(schedule_.plan()[static_cast<std::size_t>(parameters_[p].block)]);
  }
  group.control.set_plan(plans);
}

kernels::FakeQuantizeTensor Trainer::describe(const TrainedParameter& parameter) const {
  const std::int64_t row_dim = parameter.transposed ? 1 : 0;
  const at::Tensor& master = parameter.full_precision;
  for (const at::Tensor* value : {&master, &parameter.simulated}) {
    ops::check_float("Trainer", parameter.name.c_str(), value->scalar_type());
  }
  return {.input = master.const_data_ptr(),
          .output = parameter.simulated.mutable_data_ptr(),
          .rows = master.size(row_dim),
          .cols = master.size(1 - row_dim),
          .row_stride = master.stride(row_dim),
          .col_stride = master.stride(1 - row_dim),
          .group_size = parameter.group_size,
          .collected = parameter.collected.defined()
                           ? reinterpret_cast<GroupCollection*>(
                                 parameter.collected.mutable_data_ptr<std::int64_t>())
                           : nullptr,
          .first_element = parameter.first_element,
          .unsharded_cols = parameter.unsharded_cols,
          .name_hash = parameter.name_hash,
          .input_dtype = ops::dtype_of(master.scalar_type()),
          .output_dtype = ops::dtype_of(parameter.simulated.scalar_type()),
          // Readers load scales in the model's dtype; only a scale of that dtype survives it.
          .scale_dtype = ops::dtype_of(parameter.simulated.scalar_type()),
          .granularity = parameter.granularity,
          .mode = parameter.mode,
          .rounding = parameter.rounding,
          .scale_rule = parameter.scale_rule};
}

/// Collects what scales follow from that shards of other ranks share. A skipped step does it too:
/// its masters are the same, and so is what they give.
void Trainer::collect_shared(const DeviceGroup& group) {
  if (group.sharing.empty()) {
    return;
  }
  std::vector<kernels::FakeQuantizeTensor> tensors;
  bool sweeps = false;
  for (const std::size_t p : group.sharing) {
    tensors.push_back(describe(parameters_[p]));
    sweeps = sweeps || may_sweep(parameters_[p].mode, parameters_[p].scale_rule);
  }
  at::_foreach_zero_(group.collected);
  const at::Device device = group.control.step().device();
  const at::Tensor num_bits = group.control.num_bits().index_select(0, group.sharing_index);
  for (int stage = 0; stage < (sweeps ? kernels::kCollectStages : 1); ++stage) {
    ops::run_collect_groups(
        {.tensors = tensors, .num_bits = num_bits.const_data_ptr<std::int32_t>()}, stage, device);
    reduce_(stage);
  }
}

void Trainer::fake_quantize(const DeviceGroup& group, const std::optional<at::Tensor>& found_inf) {
  if (!in_place_) {
    return;
  }
  collect_shared(group);
  std::vector<kernels::FakeQuantizeTensor> tensors;
  tensors.reserve(group.members.size());
  for (const std::size_t p : group.members) {
    tensors.push_back(describe(parameters_[p]));
  }
  const Control& control = group.control;
  ops::run_fake_quantize({.tensors = tensors,
                          .num_bits = control.num_bits().const_data_ptr<std::int32_t>(),
                          .blend_ratio = control.blend_ratio().defined()
                                             ? control.blend_ratio().const_data_ptr<float>()
                                             : nullptr,
                          .seed = seed_,
                          .step = control.step().const_data_ptr<std::int64_t>(),
                          .skip = found_inf ? found_inf->const_data_ptr<float>() : nullptr},
                         control.step().device());
  for (const std::size_t p : group.members) {
    // Autograd must see that values it may have saved are gone, as after any in-place operation.
    parameters_[p].simulated.unsafeGetTensorImpl()->bump_version();
    record_written(p);
  }
}

at::Tensor Trainer::expected_value(const DeviceGroup& group, std::size_t index) const {
  const TrainedParameter& parameter = parameters_[group.members[index]];
  if (shows_masters_) {
    return parameter.full_precision.to(parameter.simulated.scalar_type());
  }
  at::Tensor expected = at::empty_like(parameter.simulated);
  kernels::FakeQuantizeTensor tensor = describe(parameter);
  tensor.output = expected.mutable_data_ptr();
  const Control& control = group.control;
  const auto offset = static_cast<std::ptrdiff_t>(index);
  ops::run_fake_quantize(
      {.tensors = std::span(&tensor, 1),
       .num_bits = control.num_bits().const_data_ptr<std::int32_t>() + offset,
       .blend_ratio = control.blend_ratio().defined()
                          ? control.blend_ratio().const_data_ptr<float>() + offset
                          : nullptr,
       .seed = seed_,
       .step = control.step().const_data_ptr<std::int64_t>()},
      control.step().device());
  return expected;
}

void Trainer::record_written(std::size_t parameter) {
  const at::Tensor& simulated = parameters_[parameter].simulated;
  versions_[parameter] = simulated._version();
  parameter_versions_[parameter] = parameters_[parameter].parameter._version();
  addresses_[parameter] = simulated.const_data_ptr();
}

}  // namespace moq::trainer
