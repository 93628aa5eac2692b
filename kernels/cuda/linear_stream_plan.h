#pragma once

#include <cstdint>

#include "kernels/cuda/linear_layout.h"

/// How linear_stream.cu shares a weight among clusters, thread blocks and warps.
namespace moq::kernels::cuda {

constexpr int kStreamWarps = 8;                 // of a thread block
constexpr int kMaxStages = 8;                   // of a warp's ring
constexpr int kMaxSplit = 8;                    // blocks of a cluster
constexpr int kSlots = 4;                       // of sums that a block holds for its cluster
constexpr int kGridBytes = kBlockRows * 4;      // scales, or zero points, of a block of rows
constexpr int kPartialStride = kBlockRows + 4;  // floats: lanes that write together meet all banks
constexpr int kMaxSharedBytes = 216 << 10;      // of a thread block
/// Of a block that leaves room for another kernel's beside it, and of one that leaves room for such
/// a block, but not for one like itself. (A block takes some more besides: linear_stream.cu.)
constexpr int kSharingBytes = 110 << 10;
constexpr int kApartBytes = 112 << 10;
/// What is worth its price from so many weights on:
/// - rings of several lengths (StreamPlan::stages);
/// - kApartBytes, behind attention (DeviceLinearArgs::spread), which takes some multiprocessors. On
///   others two blocks would find room: some would stay empty, also for all kernels behind, which
///   begin where these end. Smaller products gain more from overlapping with others like them.
constexpr std::int64_t kManyWeights = 16'000'000;
/// From so many bytes of weights on, products that are in no chain take all shared memory for their
/// rings (DeviceLinearArgs::in_chain): the next kernel's blocks would find nothing to do early. Not
/// those with a norm, which only models have.
constexpr std::int64_t kManyBytes = 32'000'000;

/// Plain data, passed to the kernel by value.
struct StreamPlan {
  int clusters;
  int split;         ///< blocks of a cluster, which share the columns; a power of two
  int part_bits;     ///< of split * kStreamWarps, the parts of the columns
  int cluster_rows;  ///< blocks of rows of a cluster; the first row_extra clusters have one more
  int row_extra;
  int turn_rows;       ///< blocks of rows whose results are finished together; a power of two
  int turn_bits;       ///< of the rows of a turn
  int share_bits;      ///< of those of them that a block of the cluster finishes
  int turn_results;    ///< of all tokens; no more than threads
  int stages[2];       ///< of a warp's ring, in clusters with cluster_rows and with one more
  int early;           ///< stages that are filled at once in the beginning
  int part_blocks;     ///< blocks of columns of a part; some have one more
  int piece[2];        ///< blocks of a stage, of parts with part_blocks and with one more
  int stage_bytes[2];  ///< the same
  int grid_bytes;  ///< of a stage, for scales, behind the blocks; as many follow for zero points
  int ring_bytes;  ///< of all warps
  int ahead_blocks[2];  ///< behind a warp's first stages, which come as far as the second-level
                        ///< cache then, as of stages
  int staged_stride;    ///< elements from one token to the next in shared memory
  int shared_bytes;
};

/// First block of columns of a part.
constexpr int part_begin(const DeviceLayout& layout, int part_bits, int part) {
  return static_cast<int>(part * layout.col_blocks >> part_bits);
}

/// Blocks of a cluster: one wherever the input fits, for clusters overlap less with the kernels
/// around them. The same for all m but 1: sums are then added up in the same order. More than
/// kMaxSplit where the input is too large for any.
int stream_split(const DeviceLayout& layout, int m);

/// For m <= kStreamTokens tokens and stream_split(layout, m) <= kMaxSplit on a GPU that runs so
/// many clusters at once, one block on a multiprocessor. leaves_room: for another block beside, if
/// the input allows it.
StreamPlan stream_plan(const DeviceLayout& layout, int m, std::int64_t clusters,
                       bool leaves_room = true);

/// Whether the blocks of a product do.
inline bool leaves_room(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  return args.in_chain || args.norm.kind != NormKind::kNone ||
         layout.n * layout.k * layout.element_bytes < kManyBytes;
}

}  // namespace moq::kernels::cuda
