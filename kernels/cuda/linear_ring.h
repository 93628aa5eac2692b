#pragma once

#include <cstdint>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_stream_plan.h"
#include "kernels/cuda/ptx.h"
#include "kernels/linear.h"

/// How linear_stream.cu brings a weight to shared memory. Device code only, of compute capability
/// 9.0.
namespace moq::kernels::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// The stages through which a warp's part of the weight comes, piece by piece. kGrids: with the
/// scales and zero points of the piece's groups.
template <int kElementBytes, bool kGrids>
class Ring {
 public:
  /// Blocks of columns [first_block, first_block + blocks) of blocks of rows [rows, last_rows).
  __device__ Ring(const DeviceLinearArgs& args, const DeviceLayout& layout, const StreamPlan& plan,
                  int first_block, int blocks, int rows, int last_rows, const std::uint8_t* stages,
                  const std::uint64_t* barriers)
      : layout_(layout),
        plan_(plan),
        first_block_(first_block),
        blocks_(blocks),
        piece_(plan.piece[blocks != plan.part_blocks]),
        stage_bytes_(plan.stage_bytes[blocks != plan.part_blocks]),
        num_stages_(plan.stages[last_rows - rows > plan.cluster_rows]),
        ahead_blocks_(plan.ahead_blocks[last_rows - rows > plan.cluster_rows]),
        group_blocks_(kGrids ? static_cast<int>(layout.group_size / layout.block_cols) : 1),
        stages_(shared_address(stages)),
        barriers_(shared_address(barriers)),
        weight_(static_cast<const std::uint8_t*>(args.weight.data)),
        source_(weight_ + (rows * layout.col_blocks + first_block) * kBlockBytes),
        rows_(blocks == 0 ? last_rows : rows),
        last_rows_(last_rows) {
    compute_now(stages_);
    compute_now(barriers_);
  }

  __device__ int piece() const { return piece_; }
  __device__ int group_blocks() const { return group_blocks_; }
  /// The group of the block-th of the warp's blocks, and the first block behind the group.
  __device__ int group_of(int block) const {
    return kGrids && layout_.groups > 1 ? (first_block_ + block) / group_blocks_ : 0;
  }
  __device__ int group_end(int block) const {
    return kGrids && layout_.groups > 1 ? (group_of(block) + 1) * group_blocks_ - first_block_
                                        : blocks_;
  }

  /// Requests the first stages: the barriers have been made and published. The warp calls this and
  /// what follows together, with the same operands but for grids().
  __device__ void begin() {
    __syncwarp();
#pragma unroll 1
    for (int stage = 0; stage < min(plan_.early, num_stages_); ++stage) {
      fill(stage);
    }
  }

  /// Fills the other stages, each when an earlier one has come, and has what follows them brought
  /// to the second-level cache.
  __device__ void fill_early() {
    __syncwarp();
#pragma unroll 1
    for (int stage = plan_.early; stage < num_stages_; ++stage) {
      if (rows_ < last_rows_) {
        wait_barrier(barriers_ + 8 * (stage - plan_.early), 0);
      }
      fill(stage);
    }
    if (ahead_blocks_ > 0 && elect_lane()) {
      read_ahead();
    }
    __syncwarp();
  }

  /// Address of the next piece, when it has come.
  __device__ std::uint32_t wait() const {
    wait_barrier(barriers_ + 8 * stage_, parity_);
    return stages_ + stage_ * stage_bytes_;
  }
  /// The warp has read it: another may take its place.
  __device__ void release() {
    __syncwarp();
    fill(stage_);
    if (++stage_ == num_stages_) {
      stage_ = 0;
      parity_ ^= 1U;
    }
  }

  /// Scales and zero points of the i-th group of a piece; without kGrids, what leaves the sums as
  /// they are.
  template <bool kBFloat16>
  __device__ Grids grids(std::uint32_t held, int i, int g) const {
    Grids grids{{1.0F, 1.0F}, {zero_pair<kBFloat16>(0.0F), zero_pair<kBFloat16>(0.0F)}};
    if constexpr (kGrids) {
      const std::uint32_t scales = held + piece_ * kBlockBytes + (i * kBlockRows + g) * 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        grids.scale[half] = load_shared(scales + 32 * half);
        if (layout_.asymmetric) {
          grids.zero[half] =
              zero_pair<kBFloat16>(load_shared(scales + plan_.grid_bytes + 32 * half));
        }
      }
    }
    return grids;
  }

 private:
  __device__ void fill(int stage) {
    if (rows_ == last_rows_) {
      return;
    }
    const int count = min(piece_, blocks_ - filled_);
    if (elect_lane()) {
      request(stage, count);
    }
    source_ += count * kBlockBytes;
    filled_ += count;
    if (filled_ == blocks_) {
      filled_ = 0;
      ++rows_;
      source_ += (layout_.col_blocks - blocks_) * kBlockBytes;
    }
  }

  /// Has the next `count` blocks copied to a stage.
  __device__ void request(int stage, int count) const {
    const std::uint32_t barrier = barriers_ + 8 * stage;
    const std::uint32_t target = stages_ + stage * stage_bytes_;
    if constexpr (kGrids) {
      const int group = group_of(filled_);
      const int bytes = (group_of(filled_ + count - 1) - group + 1) * kGridBytes;
      const std::int64_t grid = (rows_ * layout_.groups + group) * kGridBytes;
      const std::uint32_t grids = target + piece_ * kBlockBytes;
      expect_bytes(barrier, count * kBlockBytes + bytes * (layout_.asymmetric ? 2 : 1));
      bulk_copy(grids, weight_ + layout_.scales_offset + grid, bytes, barrier);
      if (layout_.asymmetric) {
        bulk_copy(grids + plan_.grid_bytes, weight_ + layout_.zero_points_offset + grid, bytes,
                  barrier);
      }
    } else {
      expect_bytes(barrier, count * kBlockBytes);
    }
    bulk_copy(target, source_, count * kBlockBytes, barrier);
  }

  /// Brings the blocks behind those that have been requested to the second-level cache.
  __device__ void read_ahead() const {
    std::uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const std::uint8_t* source = source_;
    int filled = filled_;
    int rows = rows_;
#pragma unroll 1
    for (int left = ahead_blocks_; left > 0 && rows < last_rows_; ++rows) {
      const int count = min(left, blocks_ - filled);
      asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(source),
                   "r"(count * kBlockBytes), "l"(policy)
                   : "memory");
      source += (count + layout_.col_blocks - blocks_) * kBlockBytes;
      filled = 0;
      left -= count;
    }
  }

  const DeviceLayout& layout_;
  const StreamPlan& plan_;
  int first_block_;
  int blocks_;
  int piece_;
  int stage_bytes_;
  int num_stages_;
  int ahead_blocks_;
  int group_blocks_;
  std::uint32_t stages_;
  std::uint32_t barriers_;
  const std::uint8_t* weight_;
  // what is filled next
  const std::uint8_t* source_;
  int rows_;
  int last_rows_;
  int filled_ = 0;  // blocks of those rows
  // what is read next
  int stage_ = 0;
  std::uint32_t parity_ = 0;
};

#endif

}  // namespace moq::kernels::cuda
