#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/schedule/schedule.h"
#include "csrc/trainer/control.h"
#include "kernels/common/name_hash.h"
#include "kernels/fake_quantize.h"

/// What MoQOptimizer does at each step.
namespace moq::trainer {

/// A weight matrix that is trained on a grid. It has two values: the master, which the inner
/// optimizer updates, and the simulated one, a point of the grid, which forward and backward see.
struct TrainedParameter {
  std::string name;  ///< key of its random stream: the same name on every rank
  std::uint32_t name_hash = moq::name_hash(name);
  /// The model's parameter and its master, in the form that the inner optimizer works on; either
  /// plain tensors or DTensors. Only their gradients are used.
  at::Tensor parameter;
  at::Tensor master;
  /// The same two as the memory of this rank: [out_features, in_features], or transposed.
  /// simulated is written in place; float32, float16 or bfloat16.
  at::Tensor simulated;
  at::Tensor full_precision;
  std::int64_t block = 0;  ///< number of its block in the schedule
  kernels::Granularity granularity = kernels::Granularity::kPerChannel;
  QuantMode mode = QuantMode::kSymmetric;
  Rounding rounding = Rounding::kNearest;
  ScaleRule scale_rule = ScaleRule::kExtent;
  std::int64_t group_size = 0;  ///< as FakeQuantizeTensor's
  bool transposed = false;      ///< True: stored [in_features, out_features]
  /// After a drop the weight fades from full precision to the grid: the blend ratio is
  /// max(0, 1 - (step - step of the drop) / blend_steps).
  std::int64_t blend_steps = 0;
  /// What ranks bring together where all shards of the parameter share one scale: int64
  /// [kCollectionWords] on its device, rewritten at each step. Undefined: no scale is shared.
  at::Tensor collected;
  /// Where this rank's shard lies in the whole parameter; FakeQuantizeTensor says how.
  std::int64_t first_element = 0;
  std::int64_t unsharded_cols = 0;
};

/// Words of a GroupCollection: two int32 of the extent, then a sum and a count for each sweep.
constexpr std::int64_t kCollectionWords =
    static_cast<std::int64_t>(sizeof(GroupCollection) / sizeof(std::int64_t));

/// Keeps the simulated values of a model's quantized parameters in step with their masters.
///
/// In place, that is writing them into the parameters; or only the control data, where the forward
/// pass simulates by itself and a parameter is its own master.
///
/// One optimizer step is: begin_step, the inner optimizer's step on the masters, end_step.
/// Time is the number of completed steps; an overflow step is none.
class Trainer {
 public:
  /// Does not write any simulated value; `write_simulated` does.
  /// @throws moq::Error if a block number lies outside the schedule, or a planned width outside
  ///     those that have a grid in the parameter's mode.
  Trainer(std::vector<TrainedParameter> parameters, schedule::Schedule schedule, std::uint64_t seed,
          std::int64_t step = 0, bool in_place = true);

  /// Sets what brings together over the ranks, after stage `stage` of collect_groups, what the
  /// parameters' `collected` hold. Every rank must then make the same calls that write simulated
  /// values.
  void set_reduction(std::function<void(int stage)> reduce) { reduce_ = std::move(reduce); }

  /// Gives each master the gradient of its parameter: the gradient at the simulated value, applied
  /// to the master, is the straight-through estimator. Same dtype: by reference; otherwise cast,
  /// all parameters in one call.
  /// @param cast  false: by reference in any dtype, for an inner optimizer that takes them so
  /// @throws c10::ValueError naming the parameter, if a gradient is sparse.
  void begin_step(bool cast = true);

  /// Drops the masters' gradients, advances the schedule and writes the simulated values.
  /// @param found_inf  [1] or scalar, float32: non-zero if the inner optimizer skipped this step;
  ///                   then nothing changes, but that adopted masters are simulated
  void end_step(const std::optional<at::Tensor>& found_inf = std::nullopt);

  /// Drops the masters' gradients after an inner step that failed.
  void abandon_step();

  /// Writes the simulated values at the current step. Their addresses never change.
  void write_simulated();

  /// Writes the masters, rounded to the parameters' dtype, where the simulated values are.
  void write_masters();

  /// Makes sure that every parameter's memory is laid out as it was when this object was made:
  /// kernels get addresses, and take sizes and strides from the masters.
  /// @throws moq::Error naming the parameter and both layouts. So does whatever writes, with
  ///     nothing written.
  void check_layouts() const;

  /// True if somebody else wrote to a simulated value since it was written here, if only what was
  /// there already: the same on all ranks that do the same, whatever their shards hold.
  bool touched() const;

  /// Numbers of the parameters whose simulated value somebody else changed since it was written.
  /// Costs a comparison of version counters, and one fake-quantize for each that has moved.
  std::vector<std::int64_t> overwritten() const;

  /// Width of the grid on which the values in the parameter now lie exactly, if there is one.
  /// Random weights lie on none, unless fewer than a handful of them share a scale.
  std::optional<int> grid_width(std::int64_t parameter) const;

  /// Makes what is in these parameters now their masters, and takes all others for unchanged: they
  /// are what `overwritten` returned. The next call that writes simulated values puts them on the
  /// grid.
  void adopt(const std::vector<std::int64_t>& changed);

  /// Points at the memory that holds the values now (FSDP and Module.to replace it).
  void rebind(const std::vector<at::Tensor>& simulated,
              const std::vector<at::Tensor>& full_precision);

  /// Re-plans what lies after the current step; one number in [0, 1] per block.
  void set_sensitivities(std::vector<double> sensitivities);

  /// Continues at `step` with the plan of `schedule`, which has the same blocks.
  /// @throws moq::Error, with nothing changed, if it has not, or as the constructor for its widths.
  void restore(schedule::Schedule schedule, std::int64_t step);

  const schedule::Schedule& schedule() const { return schedule_; }

  /// Completed steps; waits for the device.
  std::int64_t step() const;
  /// Completed steps as far as the host has heard; on CUDA it may lag by the steps in flight.
  std::int64_t step_seen() const;
  /// Step of the first planned drop after `step`, if there is one.
  std::optional<std::int64_t> next_drop(std::int64_t step) const;
  /// Completed steps at most: those that the host has asked for, whether or not the device skipped
  /// some. Replays of a captured step ask for nothing here; what they completed counts once the
  /// host has heard of it.
  std::int64_t step_at_most() const;
  /// Completed steps, [1], int64, in the memory of the first parameter's device.
  const at::Tensor& step_on_device() const { return groups_.front().control.step(); }
  /// What a parameter's own simulation reads, in the memory of its device: width ([1], int32),
  /// blend ratio ([1], float32; undefined if nothing blends) and completed steps ([1], int64). They
  /// stay where they are, and change at the end of each step.
  struct OnDevice {
    at::Tensor num_bits;
    at::Tensor blend_ratio;
    at::Tensor step;
  };
  OnDevice control_of(std::int64_t parameter) const;

 private:
  /// The parameters of one device, and the control data that its kernel call reads.
  struct DeviceGroup {
    std::vector<std::size_t> members;  // numbers of its parameters
    Control control;
    at::Tensor step_on_host;  // [1], int64: copy of control.step(), pinned and asynchronous on CUDA
    std::vector<std::size_t> sharing{};   // those of `members` whose scale is shared
    std::vector<at::Tensor> collected{};  // theirs
    at::Tensor sharing_index{};           // [sharing], int64: their places in `members`
  };

  struct Layout {
    std::vector<std::int64_t> sizes;
    std::vector<std::int64_t> strides;
  };

  void check_memory(const TrainedParameter& parameter) const;
  void set_plan(DeviceGroup& group) const;
  kernels::FakeQuantizeTensor describe(const TrainedParameter& parameter) const;
  void collect_shared(const DeviceGroup& group);
  void fake_quantize(const DeviceGroup& group, const std::optional<at::Tensor>& found_inf);
  at::Tensor expected_value(const DeviceGroup& group, std::size_t index) const;
  void record_written(std::size_t parameter);
  /// True if somebody wrote to a parameter, or to its shard, since record_written.
  bool was_written(std::size_t parameter) const;

  std::vector<TrainedParameter> parameters_;
  schedule::Schedule schedule_;
  std::uint64_t seed_;
  bool in_place_;
  std::function<void(int stage)> reduce_;
  std::vector<DeviceGroup> groups_;
  bool shows_masters_ = false;
  std::int64_t steps_asked_ = 0;  // completed ones, when they were known, and calls since
  bool adopted_ = false;          // since simulated values were written last
  std::vector<Layout> layouts_;   // of the parameters' memory at first
  /// Version counter and address of each simulated value when it was written last.
  std::vector<std::uint32_t> versions_;
  /// Likewise of the parameter itself: a DTensor counts what is written to it, and on all ranks,
  /// also those whose shards are empty; its shard does not.
  std::vector<std::uint32_t> parameter_versions_;
  std::vector<const void*> addresses_;
};

}  // namespace moq::trainer
