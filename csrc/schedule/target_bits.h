#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// Which width each block should end at, under a budget.
namespace moq::schedule {

/// One width that a block may end at.
struct WidthOption {
  std::int64_t cost = 0;  ///< bits, bytes or nanoseconds: whatever the budget counts; >= 0
  double loss = 0.0;      ///< what this width is expected to add to the loss; finite, >= 0
};

struct BlockOptions {
  std::string name = {};  ///< used in messages
  std::vector<WidthOption> options = {};
};

/// A choice of one option for every block that no other beats in both cost and loss.
struct FrontPoint {
  std::int64_t cost = 0;
  double loss = 0.0;
  bool operator==(const FrontPoint&) const = default;
};

/// Every choice that is worth making: all pairs of (cost, loss) that one option per block can add
/// up to, without those that another pair equals or beats in both.
///
/// Dynamic programming over the Pareto front (Nemhauser and Ullmann, Management Science 15, 1969):
/// the front of the first i blocks is that of the first i - 1, moved by each option of block i and
/// merged. A prefix that is beaten stays beaten whatever follows it, also in rounded additions,
/// which are monotonic: the result is exact, where the loss of a choice is the sum of its options'
/// losses in the order of the blocks. Convexity is not assumed.
///
/// A prefix that is kept takes 4 bytes; finding it takes at most options^2 comparisons. There is at
/// most one for each sum of costs, so layers of one size make a front of a few hundred points;
/// costs without a common divisor make more (200 blocks of 3 widths: thousands), up to
/// `max_prefixes` over all blocks.
///
/// Additions and comparisons alone, on one thread: the same front on every machine.
class ParetoFront {
 public:
  /// 256 MiB of prefixes, some seconds.
  static constexpr std::int64_t kMaxPrefixes = std::int64_t{1} << 26;
  static constexpr std::int64_t kMaxOptions = 64;

  /// @throws moq::Error naming the block: if there is none, if one has no option or more than
  ///     kMaxOptions, if a cost is negative, if a loss is negative or not finite, if the largest
  ///     costs or losses add up to more than 2^62 or to infinity; or if more than max_prefixes
  ///     prefixes would have to be kept.
  explicit ParetoFront(const std::vector<BlockOptions>& blocks,
                       std::int64_t max_prefixes = kMaxPrefixes);

  /// From the cheapest choice to the one of least loss: costs rise strictly, losses fall strictly.
  /// Never empty.
  const std::vector<FrontPoint>& points() const { return points_; }

  /// The index of each block's option behind a point. Of choices with the same cost and the same
  /// loss it is the one whose last block has the lowest index, then the last but one, and so on.
  /// @throws moq::Error unless 0 <= point < points().size().
  std::vector<std::int64_t> choice(std::int64_t point) const;

  /// The point of least loss whose cost is at most `budget`.
  /// @throws moq::Error naming the smallest feasible budget, if there is none.
  std::int64_t within(std::int64_t budget) const;

  /// Prefixes kept over all blocks, of 4 bytes each.
  std::int64_t num_prefixes() const { return num_prefixes_; }

 private:
  /// Where a prefix comes from: the index of the prefix before it times the number of options of
  /// its block, plus the index of the option.
  using Link = std::uint32_t;
  struct Level {
    std::int64_t num_options = 0;
    std::vector<Link> links;
  };

  void extend(const BlockOptions& block, std::int64_t max_prefixes);

  std::vector<FrontPoint> points_;
  std::vector<Level> levels_;
  std::int64_t num_prefixes_ = 0;
};

}  // namespace moq::schedule
