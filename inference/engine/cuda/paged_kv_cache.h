#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "inference/engine/kv_cache.h"
#include "kernels/attention.h"

struct CUstream_st;

namespace moq::inference::cuda {

/// A KV cache on a GPU, in pages of kernels::kPageTokens tokens that any slot may own.
///
/// A page holds the tokens of one sequence, or of several that were forked from one: a page that
/// several slots share is copied when one of them writes to it. All pages are allocated at
/// construction. The table of the slots' pages lies in device memory, where kernels read it.
class PagedKvCache final : public KvCache {
 public:
  /// @param dtype        of keys and values: that of the activations, or kInt8
  /// @throws moq::Error as KvCache, or if the device's memory does not hold it, naming sizes that
  ///         would fit
  PagedKvCache(std::int64_t num_layers, std::int64_t num_kv_heads, std::int64_t head_dim,
               std::int64_t num_slots, std::int64_t capacity, DType dtype);

  std::int64_t bytes() const override;
  at::Device device() const { return data_.device(); }
  DType dtype() const { return dtype_; }
  /// Tells this cache from every other one of the process.
  std::uint64_t id() const { return id_; }

  /// Makes the slot's pages hold `num_tokens` more tokens than it has, and own them alone.
  /// @param rows  receives the row in the cache of each of these tokens (DevicePages)
  void make_room(std::int64_t slot, std::int64_t num_tokens, std::span<std::int32_t> rows,
                 CUstream_st* stream);
  /// Brings the device's page table up to date with what make_room has changed, on a stream which
  /// has done what it was given before the last call. Returns the memory that the stream reads
  /// meanwhile.
  at::Tensor sync_page_table(CUstream_st* stream);

  kernels::DevicePages pages(std::int64_t layer) const;
  /// Elements from a layer's keys, or values, to those of the next one.
  std::int64_t layer_stride() const;
  const std::int32_t* page_table() const { return device_table_.const_data_ptr<std::int32_t>(); }
  std::int64_t page_table_stride() const { return pages_per_slot_; }

 private:
  static constexpr std::int32_t kNoPage = -1;

  void copy(std::int64_t from, std::int64_t to) override;
  void forget(std::int64_t slot, std::int64_t length) override;
  std::int32_t& page_of(std::int64_t slot, std::int64_t index) {
    return table_[static_cast<std::size_t>(slot * pages_per_slot_ + index)];
  }
  std::int32_t take_page();
  void release_page(std::int32_t page);
  void copy_page(std::int32_t from, std::int32_t to, CUstream_st* stream);
  std::int64_t page_bytes() const;
  std::int64_t page_scale_bytes() const;

  DType dtype_;
  std::int64_t pages_per_slot_;
  std::int64_t num_pages_;
  std::uint64_t id_;
  std::vector<std::int32_t> owners_;  ///< of each page, slots that name it
  std::vector<std::int32_t> free_pages_;
  std::vector<std::int32_t> table_;  ///< [slots, pages_per_slot]
  at::Tensor pinned_table_;          ///< the same, on its way to the device
  at::Tensor device_table_;          ///< the same, as kernels see it
  bool table_changed_ = true;
  at::Tensor data_;    ///< [layers, {keys, values}, pages, kv heads, page tokens, head_dim]
  at::Tensor scales_;  ///< [layers, {keys, values}, pages, kv heads, page tokens] float32; INT8
};

}  // namespace moq::inference::cuda
