#pragma once

#include <cstdint>

#include "csrc/schedule/schedule.h"

/// What the files of this folder share beyond the public header.
namespace moq::schedule {

/// @throws moq::Error naming the first value that is out of range, or the block that cannot finish
///     by finish_at with the smallest change that would let it.
void check_config(const ScheduleConfig& config);

/// @throws moq::Error unless `measurement` can follow one made at `previous_step`.
void check_measurement(const ScheduleConfig& config, const Measurement& measurement,
                       std::int64_t previous_step);

/// The step at which the slowest block with `finish_at` arrives: floor(finish_at * total_steps).
std::int64_t deadline(double finish_at, std::int64_t total_steps);

/// Durations are integers in units of 2^-16 steps, stretch factors in units of 2^-16.
inline constexpr int kFractionBits = 16;
inline constexpr std::int64_t kOne = std::int64_t{1} << kFractionBits;
/// Bound of a block's whole duration: products with a stretch and a number of steps fit in 128
/// bits.
inline constexpr std::int64_t kMaxDuration = std::int64_t{1} << 60;
inline constexpr std::int64_t kMaxSteps = std::int64_t{1} << 40;
inline constexpr std::int64_t kMaxCounts = std::int64_t{1} << 20;

/// The stretch factor, in units of 2^-16, that the named rule gives to `sensitivity`.
std::int64_t stretch(const std::string& rule, double sensitivity);

/// Residence times at start_bits, start_bits - 1, … target_bits + 1, unstretched, in 2^-16 steps;
/// with counts_per_step in 2^-16 counts.
/// @throws moq::Error if they sum to more than kMaxDuration.
std::vector<std::int64_t> residence_times(const Geometric& rule);

}  // namespace moq::schedule
