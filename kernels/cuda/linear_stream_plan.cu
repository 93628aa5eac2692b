#include "kernels/cuda/linear_stream_plan.h"

#include <algorithm>
#include <bit>

#include "kernels/cuda/linear_choice.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = kStreamWarps * 32;
constexpr int kMaxTurnRows = 8;
constexpr int kMaxPieceBlocks = 16;        // of a stage
constexpr int kFewestPieceBlocks = 4;      // if a ring of such pieces finds room
constexpr int kMaxSliceBytes = 128 << 10;  // of the input, in a block
/// Two blocks share a multiprocessor, so that the next kernel's fill their rings while this one's
/// work, if so much of kSharingBytes is left for the rings. That is worth more than longer ones.
constexpr int kSharingRingBytes = 64 << 10;
constexpr int kUsualBytes = 200 << 10;  // where the input leaves less
constexpr int kFewestRingBytes = 40 << 10;
/// Requested by a block before the first of it has come. More would only wait in the memory's
/// queues, and before what a kernel ahead reads there.
constexpr int kEarlyBytes = 32 << 10;
/// The same of a block that leaves no room for another, to the nearest stage.
constexpr int kEarlyBytesWithoutRoom = 64 << 10;
/// Of a block that may begin early, what comes to the second-level cache behind its rings' first
/// stages: these are filled again at once when the input has come. Of one that has more rows than
/// others, more: the others shall not wait for it in the end.
constexpr int kAheadBytes[2] = {24 << 10, 100 << 10};
/// One in so many clusters, at most, has longer rings than the others.
constexpr int kLongerRings = 8;

/// The same 16 bytes of eight tokens, which are loaded at once, meet all banks.
int staged_stride(const DeviceLayout& layout, int split) {
  const std::int64_t cols = pad_to(layout.col_blocks, split) / split * layout.block_cols;
  return static_cast<int>(pad_to(cols, 16)) + 8;
}

/// Parts of a block of the cluster that have one block of columns more than others, at most.
int longer_parts(const DeviceLayout& layout, const StreamPlan& plan) {
  int longer = 0;
  for (int rank = 0; rank < plan.split; ++rank) {
    longer = std::max(longer, part_begin(layout, plan.part_bits, (rank + 1) * kStreamWarps) -
                                  part_begin(layout, plan.part_bits, rank * kStreamWarps) -
                                  kStreamWarps * plan.part_blocks);
  }
  return longer;
}

/// Bytes for the scales (or the zero points) of the groups that so many blocks have parts of.
int grid_bytes(const DeviceLayout& layout, int blocks) {
  if (layout.element_bytes != 1 || (layout.groups == 1 && !layout.asymmetric)) {
    return 0;
  }
  const auto group_blocks = static_cast<int>(layout.group_size / layout.block_cols);
  return layout.groups == 1
             ? kGridBytes
             : std::min((blocks + group_blocks - 2) / group_blocks + 1, blocks) * kGridBytes;
}

/// Stages of the clusters that have fewer rows, if those with one more are few: all shall end
/// together, and a multiprocessor gets as large a share of the bandwidth as of the bytes under way.
/// (Where those with more are many, they read at full speed when the others have ended.)
int shorter_ring(const DeviceLayout& layout, const StreamPlan& plan, int stages) {
  if (layout.n * layout.k < kManyWeights || plan.row_extra == 0 ||
      plan.row_extra * kLongerRings > plan.clusters) {
    return stages;
  }
  const int rows = plan.cluster_rows + 1;
  const int share = (stages * plan.cluster_rows + rows / 2) / rows;
  return std::max(std::min(2, stages), std::min(share, stages - 1));
}

constexpr int whole_pair(int blocks) {
  return blocks + blocks % 2;
}

/// What the rings of a block of the cluster are planned for.
struct RingNeeds {
  int rows;          ///< blocks of rows of a cluster, at most
  int longer;        ///< parts that have one block of columns more
  int other_bytes;   ///< of shared memory
  bool leaves_room;  ///< for another block, if the input allows it
};

/// What the rings are worth: the blocks that they hold, the last piece of a row being shorter, and
/// less for pieces of odd numbers of them, since blocks are multiplied two by two.
double worth(const RingNeeds& needs, const StreamPlan& plan) {
  double sum = 0;
  for (int i = 0; i < 2; ++i) {
    const int cols = plan.part_blocks + i;
    const int piece = plan.piece[i];
    const int whole = cols / piece;
    const int rest = cols % piece;
    const int pieces = std::max(1, whole + (rest > 0 ? 1 : 0));
    const int held =
        plan.stages[1] / pieces * cols + std::min(plan.stages[1] % pieces * piece, cols);
    const int products = std::max(1, whole * whole_pair(piece) + whole_pair(rest));
    const int parts = i == 0 ? kStreamWarps - needs.longer : needs.longer;
    sum += parts * std::min(held, needs.rows * cols) * static_cast<double>(whole_pair(cols)) /
           products;
  }
  return sum;
}

/// Rings of plan.piece, where a part comes in so many pieces. Returns whether there is room for
/// some stages, or for all.
bool plan_stages(const DeviceLayout& layout, const RingNeeds& needs, int pieces, StreamPlan& plan) {
  plan.grid_bytes = grid_bytes(layout, plan.piece[1]);
  for (int i = 0; i < 2; ++i) {
    plan.stage_bytes[i] = plan.piece[i] * kBlockBytes + 2 * plan.grid_bytes;
  }
  const int bytes =
      needs.longer * plan.stage_bytes[1] + (kStreamWarps - needs.longer) * plan.stage_bytes[0];
  const int usual = !needs.leaves_room                                       ? kMaxSharedBytes
                    : kSharingBytes - needs.other_bytes >= kSharingRingBytes ? kSharingBytes
                                                                             : kUsualBytes;
  const int all = needs.rows * pieces;
  const int room = std::max(usual - needs.other_bytes, kFewestRingBytes) / bytes;
  const bool holds_all = all <= kMaxStages && all * bytes + needs.other_bytes <= kSharingBytes;
  const int stages = holds_all ? all : std::min({kMaxStages, all, room});
  plan.stages[0] = holds_all ? all : shorter_ring(layout, plan, stages);
  plan.stages[1] = stages;
  for (int i = 0; i < 2; ++i) {
    plan.ahead_blocks[i] = holds_all ? 0 : kAheadBytes[i] / (kStreamWarps * kBlockBytes);
  }
  plan.early = std::max(
      1, needs.leaves_room ? kEarlyBytes / bytes : (kEarlyBytesWithoutRoom + bytes / 2) / bytes);
  plan.ring_bytes = static_cast<int>(pad_to(stages * bytes, 128));
  return plan.piece[1] <= kMaxPieceBlocks && stages >= std::min(3, all);
}

/// The rings that are worth most, in as few pieces as are worth so much but for a tenth.
void plan_rings(const DeviceLayout& layout, const RingNeeds& needs, StreamPlan& plan) {
  StreamPlan tried = plan;
  double most = -1;
  const auto try_pieces = [&](int pieces) {
    if (plan_stages(layout, needs, pieces, tried) || tried.piece[1] <= 2) {
      if (const double found = worth(needs, tried); most < 0 || found > 1.1 * most) {
        most = found;
        plan = tried;
      }
    }
  };
  const int fewest = std::max(1, (plan.part_blocks + kMaxPieceBlocks) / kMaxPieceBlocks);
  const int all = needs.rows * (kStreamWarps * plan.part_blocks + needs.longer);
  for (int pieces = fewest; most < 0 || (tried.piece[1] > kFewestPieceBlocks && 1.1 * most < all);
       ++pieces) {
    const int exact[2] = {std::max(1, (plan.part_blocks + pieces - 1) / pieces),
                          (plan.part_blocks + pieces) / pieces};
    if (pieces > 1 && (exact[0] % 2 != 0 || exact[1] % 2 != 0)) {
      std::transform(exact, exact + 2, tried.piece, whole_pair);
      try_pieces(pieces);
    }
    std::copy(exact, exact + 2, tried.piece);
    try_pieces(pieces);
  }
}

}  // namespace

int stream_split(const DeviceLayout& layout, int m) {
  const std::int64_t tokens = m == 1 ? 1 : kStreamTokens;
  int split = 1;
  while (split <= kMaxSplit && tokens * staged_stride(layout, split) * 2 > kMaxSliceBytes) {
    split *= 2;
  }
  return split;
}

StreamPlan stream_plan(const DeviceLayout& layout, int m, std::int64_t clusters, bool leaves_room) {
  StreamPlan plan{};
  plan.clusters = static_cast<int>(std::min(layout.row_blocks, clusters));
  plan.cluster_rows = static_cast<int>(layout.row_blocks / plan.clusters);
  plan.row_extra = static_cast<int>(layout.row_blocks % plan.clusters);
  const int rows = plan.cluster_rows + (plan.row_extra > 0 ? 1 : 0);
  plan.split = stream_split(layout, m);
  plan.part_bits = std::countr_zero(static_cast<unsigned>(plan.split * kStreamWarps));
  plan.part_blocks = part_begin(layout, plan.part_bits, 1);
  plan.staged_stride = staged_stride(layout, plan.split);
  plan.turn_rows = 1;
  while (plan.turn_rows < std::min(kMaxTurnRows, rows) &&
         2 * plan.turn_rows * m * kBlockRows <= kThreads) {
    plan.turn_rows *= 2;
  }
  plan.turn_results = plan.turn_rows * m * kBlockRows;
  plan.turn_bits = std::countr_zero(static_cast<unsigned>(plan.turn_rows * kBlockRows));
  plan.share_bits = plan.turn_bits - std::countr_zero(static_cast<unsigned>(plan.split));
  const int other_bytes = plan.turn_rows * kStreamWarps * m * kPartialStride * 4 +
                          (plan.split == 1 ? 0 : kSlots * plan.turn_results * 4) +
                          m * plan.staged_stride * 2;
  plan_rings(layout,
             {.rows = rows,
              .longer = longer_parts(layout, plan),
              .other_bytes = other_bytes,
              .leaves_room = leaves_room},
             plan);
  plan.shared_bytes = plan.ring_bytes + other_bytes;
  if (plan.shared_bytes > kSharingBytes) {
    plan.ahead_blocks[0] = plan.ahead_blocks[1] = 0;
  }
  return plan;
}

}  // namespace moq::kernels::cuda
