#pragma once

#include <string>
#include <string_view>

#include "csrc/schedule/schedule.h"

/// A schedule as text, to be saved with the optimizer that follows it.
namespace moq::schedule {

/// The version goes up when the keys change, or when the same keys would give another plan.
inline constexpr int kStateVersion = 3;

/// Configuration and measurements as one JSON object:
///
///   version, total_steps, on_unfinished, stretch_rule,
///   blocks        [{name, start_bits, target_bits, period, offset, growth, finish_at (or null)} or
///                  {name, table: [[step, bits], …]}, …]
///   measurements  [{step, sensitivities: [number, …]}, …]
std::string to_json(const Schedule& schedule);

/// The schedule whose to_json is `state`, with the same plan.
/// @throws moq::Error naming the key that is missing or of another type, the version if it is not
///     kStateVersion, or as the constructor of Schedule.
Schedule from_json(std::string_view state);

}  // namespace moq::schedule
