#include "csrc/schedule/target_bits.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "kernels/common/check.h"

namespace moq::schedule {

namespace {

constexpr const char* kWhere = "target bits: ";
constexpr std::int64_t kMaxCost = std::int64_t{1} << 62;

void check_options(const BlockOptions& block) {
  MOQ_CHECK(!block.options.empty(), kWhere, "'", block.name,
            "' must have at least one option, got none");
  MOQ_CHECK(block.options.size() <= ParetoFront::kMaxOptions, kWhere, "'", block.name,
            "' must have at most ", ParetoFront::kMaxOptions, " options, got ",
            block.options.size());
  for (const WidthOption& option : block.options) {
    MOQ_CHECK(option.cost >= 0 && option.cost <= kMaxCost, kWhere, "costs of '", block.name,
              "' must lie in [0, 2^62], got ", option.cost);
    MOQ_CHECK(std::isfinite(option.loss) && option.loss >= 0.0, kWhere, "losses of '", block.name,
              "' must be finite and >= 0, got ", option.loss);
  }
}

/// So that no sum of the search overflows.
void check_sums(const std::vector<BlockOptions>& blocks) {
  FrontPoint sum;
  for (const BlockOptions& block : blocks) {
    FrontPoint largest;
    for (const WidthOption& option : block.options) {
      largest = {std::max(largest.cost, option.cost), std::max(largest.loss, option.loss)};
    }
    MOQ_CHECK(largest.cost <= kMaxCost - sum.cost, kWhere,
              "the largest costs must add up to at most 2^62, got more at '", block.name, "'");
    sum = {sum.cost + largest.cost, sum.loss + largest.loss};
    MOQ_CHECK(std::isfinite(sum.loss), kWhere,
              "the largest losses must add up to a finite number, got infinity at '", block.name,
              "'");
  }
}

bool comes_first(const FrontPoint& a, const FrontPoint& b) {
  return a.cost < b.cost || (a.cost == b.cost && a.loss < b.loss);
}

}  // namespace

ParetoFront::ParetoFront(const std::vector<BlockOptions>& blocks, std::int64_t max_prefixes)
    : points_{{.cost = 0, .loss = 0.0}} {
  MOQ_CHECK(!blocks.empty(), kWhere, "there must be at least one block, got none");
  MOQ_CHECK(max_prefixes >= 1 && max_prefixes <= kMaxPrefixes, kWhere,
            "max_prefixes must lie in [1, ", kMaxPrefixes, "], got ", max_prefixes);
  for (const BlockOptions& block : blocks) {
    check_options(block);
  }
  check_sums(blocks);
  for (const BlockOptions& block : blocks) {
    extend(block, max_prefixes);
  }
}

void ParetoFront::extend(const BlockOptions& block, std::int64_t max_prefixes) {
  const std::size_t num_options = block.options.size();
  std::vector<std::size_t> heads(num_options, 0);  // per option the next prefix to be moved by it
  std::vector<FrontPoint> moved(num_options);      // and where it moves that prefix
  const auto move_head = [&](std::size_t option) {
    const FrontPoint& prefix = points_[heads[option]];
    const WidthOption& width = block.options[option];
    moved[option] = {prefix.cost + width.cost, prefix.loss + width.loss};
  };
  for (std::size_t option = 0; option < num_options; ++option) {
    move_head(option);
  }

  std::vector<FrontPoint> front;
  Level level{.num_options = static_cast<std::int64_t>(num_options), .links = {}};
  while (true) {
    // Each option moves a sorted front to a sorted one. Of equal points the first option's is kept.
    std::size_t first = num_options;
    for (std::size_t option = 0; option < num_options; ++option) {
      if (heads[option] < points_.size() &&
          (first == num_options || comes_first(moved[option], moved[first]))) {
        first = option;
      }
    }
    if (first == num_options) {
      break;
    }
    if (front.empty() || moved[first].loss < front.back().loss) {
      MOQ_CHECK(num_prefixes_ < max_prefixes, kWhere, "at most ", max_prefixes,
                " choices must be worth comparing, got more at '", block.name,
                "': count the costs in a coarser unit, or offer fewer widths");
      ++num_prefixes_;
      front.push_back(moved[first]);
      level.links.push_back(static_cast<Link>(heads[first] * num_options + first));
    }
    if (++heads[first] < points_.size()) {
      move_head(first);
    }
  }
  level.links.shrink_to_fit();
  points_ = std::move(front);
  levels_.push_back(std::move(level));
}

std::vector<std::int64_t> ParetoFront::choice(std::int64_t point) const {
  MOQ_CHECK(point >= 0 && point < static_cast<std::int64_t>(points_.size()), kWhere,
            "a point must lie in [0, ", points_.size(), "), got ", point);
  std::vector<std::int64_t> options(levels_.size());
  auto prefix = static_cast<std::size_t>(point);
  for (std::size_t i = levels_.size(); i-- > 0;) {
    const std::int64_t link = levels_[i].links[prefix];
    options[i] = link % levels_[i].num_options;
    prefix = static_cast<std::size_t>(link / levels_[i].num_options);
  }
  return options;
}

std::int64_t ParetoFront::within(std::int64_t budget) const {
  MOQ_CHECK(budget >= points_.front().cost, kWhere, "the budget must be at least ",
            points_.front().cost, ", the smallest feasible one, got ", budget);
  const auto above =
      std::upper_bound(points_.begin(), points_.end(), budget,
                       [](std::int64_t limit, const FrontPoint& p) { return limit < p.cost; });
  return above - points_.begin() - 1;
}

}  // namespace moq::schedule
