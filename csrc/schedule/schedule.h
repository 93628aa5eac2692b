#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

/// When each block of the model falls to which bit width.
///
/// Time is the number of completed optimizer steps and nothing else: after `step` steps the block's
/// weights have bits_at(block, step) bits. A drop "at step 15" is made at the end of the 15th step.
///
/// The plan is a pure function of the configuration and of the measurements made so far. It is
/// computed in integers (residence times in units of 2^-16 steps), so every rank, processor and
/// resumed run computes the same one.
namespace moq::schedule {

/// Widths fall by one bit at a time: the block stays `period` steps at start_bits after `offset`
/// steps, then growth times as long at each following width. 16 -> 8 bits with growth 2 takes
/// 255 periods.
///
/// With finish_at only the ratio of the periods counts: the residence times of all blocks that have
/// the same finish_at are scaled by one common factor, anew after each measurement, so that the
/// slowest of them arrives exactly at floor(finish_at * total_steps). Several widths may then fall
/// in one step. (A product within 1e-6 below an integer counts as that integer.)
///
/// With counts_per_step the block follows a counter instead, as DeepSpeed's layers do: from the
/// offset on it grows by so many a step, and the width falls when it reaches `period`, then when it
/// reaches growth times that count, and so on. A sensitivity multiplies each of these counts but
/// the first: the next one is growth times stretch times the one before.
struct Geometric {
  int start_bits = 16;      ///< in [1, 32], >= target_bits
  int target_bits = 8;      ///< >= 1
  std::int64_t period = 1;  ///< steps, >= 1
  std::int64_t offset = 0;  ///< steps at start_bits before the first period begins, >= 0
  double growth = 2.0;      ///< in [1, 16]; taken to the nearest 2^-16
  std::optional<double> finish_at = std::nullopt;  ///< in (0, 1]
  std::int64_t counts_per_step = 0;  ///< in [0, 2^20]; 0: `period` is steps. Without finish_at
};

/// {step: bits}, fixed whatever is measured. The first entry is at step 0 (the start width); bits
/// fall strictly.
using Table = std::map<std::int64_t, int>;

struct ScheduledBlock {
  std::string name = {};  ///< used in messages; need not be unique
  std::variant<Geometric, Table> rule;
};

/// What happens to a block that does not reach its target by total_steps (without finish_at, which
/// is always met).
enum class OnUnfinished : std::uint8_t {
  kError,  ///< refused, with the smallest changes that would fix it
  kClamp,  ///< its remaining residence times are shortened in proportion, to arrive at total_steps
  kAllow,  ///< it ends at the width it has reached by then
};

/// "error", "clamp" or "allow". @throws moq::Error on any other string.
OnUnfinished parse_on_unfinished(const std::string& name);
const char* name_of(OnUnfinished policy);

/// How a normalised sensitivity s in [0, 1] multiplies the residence times still ahead of a block:
///   "none"     1; such a schedule takes no measurements
///   "stepped"  1 + floor(4 s), the rule of MoQ
///   "linear"   1 + 4 s
struct ScheduleConfig {
  std::vector<ScheduledBlock> blocks = {};
  std::int64_t total_steps = 0;  ///< optimizer steps of the whole training, in [1, 2^40]
  OnUnfinished on_unfinished = OnUnfinished::kError;
  std::string stretch_rule = "none";
};

/// Names of all stretch rules.
std::vector<std::string> stretch_rules();

/// Sensitivities in [0, 1], one per block, measured after `step` completed steps.
struct Measurement {
  std::int64_t step = 0;
  std::vector<double> sensitivities;
};

/// From `step` completed steps on the block has `bits` bits.
struct Drop {
  std::int64_t step = 0;
  int bits = 0;
  bool operator==(const Drop&) const = default;
};

/// Every width of one block in order: first {0, start_bits}, last {arrival, target_bits}; steps
/// never fall, bits fall strictly. Drops beyond total_steps are those that will not be made.
using BlockPlan = std::vector<Drop>;
/// One BlockPlan per block, in the order of ScheduleConfig::blocks.
using Plan = std::vector<BlockPlan>;

/// The drops that are made when `measurements` (in order of step) are all the measurements there
/// are. A measurement moves only drops after its step, and never to its own step.
/// @throws moq::Error if the configuration or a measurement is invalid.
Plan plan(const ScheduleConfig& config, std::span<const Measurement> measurements = {});

/// The earliest and the latest that each drop can come, whatever the measurements say. With
/// finish_at: to within a step, whatever one measurement (at any step) says.
struct Bounds {
  Plan earliest;
  Plan latest;
};
Bounds bounds(const ScheduleConfig& config);

/// The bit width of `plan` after `step` completed steps.
int bits_at(const BlockPlan& plan, std::int64_t step);

/// A block that might not reach its target by total_steps.
struct Unfinished {
  std::string block;
  std::int64_t arrival = 0;  ///< the latest step at which the target can be reached
  int bits = 0;              ///< the width at total_steps if it comes that late
  /// The largest period that is certain to finish; empty for a Table, or if even 1 is too long.
  std::optional<std::int64_t> largest_period = std::nullopt;
  bool has_table = false;  ///< it falls at given steps, not by periods
};

/// All unfinished blocks of a configuration, whatever on_unfinished says; finish_at is always met.
std::vector<Unfinished> unfinished(const ScheduleConfig& config);

/// A configuration with the measurements made so far, and the plan that follows from both.
class Schedule {
 public:
  /// @throws moq::Error if the configuration is invalid, or if on_unfinished is kError and a block
  ///     might not finish: the message names the slowest block and the smallest changes that help.
  explicit Schedule(ScheduleConfig config, std::vector<Measurement> measurements = {});

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(plan_.size()); }
  /// @throws moq::Error unless 0 <= block < num_blocks() and step >= 0.
  int bits_at(std::int64_t block, std::int64_t step) const;
  /// True if all blocks have their target width after `step` steps.
  bool finished(std::int64_t step) const;

  /// Re-plans everything after `step`. What was planned up to `step` has happened and stays.
  /// @throws moq::Error if the stretch rule is "none", the step lies before an earlier measurement,
  ///     or `sensitivities` is not one number in [0, 1] per block; the schedule is then unchanged.
  void set_sensitivities(std::int64_t step, std::vector<double> sensitivities);

  const ScheduleConfig& config() const { return config_; }
  /// config() and measurements() are the whole state: Schedule(config, measurements) is this
  /// object.
  const std::vector<Measurement>& measurements() const { return measurements_; }
  const Plan& plan() const { return plan_; }

  /// Steps that have been made, as far as anybody said so: the drops planned up to then have
  /// happened, whatever is measured later. For who shows the schedule; no part of its state.
  std::int64_t completed_steps() const { return completed_steps_; }
  /// @throws moq::Error if `steps` is negative.
  void set_completed_steps(std::int64_t steps);

 private:
  ScheduleConfig config_;
  std::vector<Measurement> measurements_;
  Plan plan_;
  std::int64_t completed_steps_ = 0;
};

}  // namespace moq::schedule
