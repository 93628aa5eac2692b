#include "inference/engine/cuda/paged_kv_cache.h"

#include <ATen/ops/empty.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <string>

#include "inference/engine/cuda/device_memory.h"
#include "kernels/common/check.h"
#include "kernels/cuda/cuda_check.h"

namespace moq::inference::cuda {
namespace {

constexpr std::int64_t kPageTokens = kernels::kPageTokens;

std::int64_t pages_for(std::int64_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

PagedKvCache::PagedKvCache(std::int64_t num_layers, std::int64_t num_kv_heads,
                           std::int64_t head_dim, std::int64_t num_slots, std::int64_t capacity,
                           DType dtype)
    : KvCache(num_layers, num_kv_heads, head_dim, num_slots, capacity),
      dtype_(dtype),
      pages_per_slot_(pages_for(capacity)),
      num_pages_(num_slots * pages_per_slot_),
      id_(next_id()) {
  MOQ_CHECK(num_pages_ <= std::numeric_limits<std::int32_t>::max() / kPageTokens,
            "kv cache: slots * capacity, in whole pages, must be below 2^31, got ", num_slots,
            " and ", capacity);
  const auto hint = [&](std::int64_t usable) {
    const std::int64_t a_page = num_layers * 2 * (page_bytes() + page_scale_bytes());
    const std::int64_t held =
        (data_.defined() ? data_.numel() : 0) + (scales_.defined() ? scales_.numel() : 0);
    const std::int64_t fitting = (usable + held) / a_page;
    const std::int64_t fitting_tokens = fitting / num_slots * kPageTokens;
    std::string words = in_units(a_page * pages_per_slot_) + " for each of " +
                        std::to_string(num_slots) + " sequences of " + std::to_string(capacity) +
                        " tokens; " + std::to_string(fitting / pages_per_slot_) +
                        " such sequences would fit";
    if (fitting_tokens > 0) {
      words +=
          ", or " + std::to_string(num_slots) + " of " + std::to_string(fitting_tokens) + " tokens";
    }
    return words;
  };
  data_ = cuda::allocate(num_layers * 2 * num_pages_ * page_bytes(), "the KV cache", hint);
  scales_ = cuda::allocate(num_layers * 2 * num_pages_ * page_scale_bytes(), "the KV cache", hint);
  device_table_ = cuda::allocate({num_slots, pages_per_slot_}, at::kInt, "the KV cache", hint);
  pinned_table_ =
      at::empty({num_slots, pages_per_slot_}, at::TensorOptions(at::kInt).pinned_memory(true));
  table_.assign(static_cast<std::size_t>(num_pages_), kNoPage);
  owners_.assign(static_cast<std::size_t>(num_pages_), 0);
  free_pages_.resize(static_cast<std::size_t>(num_pages_));
  std::iota(free_pages_.rbegin(), free_pages_.rend(), 0);
}

std::int64_t PagedKvCache::page_bytes() const {
  return num_kv_heads() * kPageTokens * head_dim() * static_cast<std::int64_t>(size_of(dtype_));
}

std::int64_t PagedKvCache::page_scale_bytes() const {
  return dtype_ == DType::kInt8 ? num_kv_heads() * kPageTokens * 4 : 0;
}

std::int64_t PagedKvCache::bytes() const {
  return data_.numel() + scales_.numel() + static_cast<std::int64_t>(device_table_.nbytes());
}

std::int32_t PagedKvCache::take_page() {
  MOQ_CHECK(!free_pages_.empty(), "kv cache: a new page must be free, got all ", num_pages_,
            " in use");
  const std::int32_t page = free_pages_.back();
  free_pages_.pop_back();
  owners_[static_cast<std::size_t>(page)] = 1;
  return page;
}

void PagedKvCache::release_page(std::int32_t page) {
  if (--owners_[static_cast<std::size_t>(page)] == 0) {
    free_pages_.push_back(page);
  }
}

void PagedKvCache::copy_page(std::int32_t from, std::int32_t to, CUstream_st* stream) {
  const auto copy_in = [&](const at::Tensor& all, std::int64_t bytes) {
    auto* base = static_cast<char*>(all.mutable_data_ptr());
    for (std::int64_t slab = 0; bytes > 0 && slab < num_layers() * 2; ++slab) {
      char* pages = base + slab * num_pages_ * bytes;
      MOQ_CUDA_CHECK(cudaMemcpyAsync(pages + to * bytes, pages + from * bytes,
                                     static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                                     stream));
    }
  };
  copy_in(data_, page_bytes());
  copy_in(scales_, page_scale_bytes());
}

void PagedKvCache::make_room(std::int64_t slot, std::int64_t num_tokens,
                             std::span<std::int32_t> rows, CUstream_st* stream) {
  const std::int64_t first = length(slot);
  for (std::int64_t index = first / kPageTokens; index < pages_for(first + num_tokens); ++index) {
    std::int32_t& page = page_of(slot, index);
    if (page != kNoPage && owners_[static_cast<std::size_t>(page)] == 1) {
      continue;
    }
    const std::int32_t own = take_page();
    if (page != kNoPage) {
      copy_page(page, own, stream);
      release_page(page);
    }
    page = own;
    table_changed_ = true;
  }
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    const std::int64_t position = first + i;
    rows[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(
        page_of(slot, position / kPageTokens) * kPageTokens + position % kPageTokens);
  }
}

at::Tensor PagedKvCache::sync_page_table(CUstream_st* stream) {
  if (table_changed_) {
    std::copy(table_.begin(), table_.end(), pinned_table_.mutable_data_ptr<std::int32_t>());
    // (Not by torch's copy: pinned memory that it has read is given back with an event on the
    // stream, which another thread may be capturing when this cache ends.)
    MOQ_CUDA_CHECK(cudaMemcpyAsync(device_table_.mutable_data_ptr(), pinned_table_.const_data_ptr(),
                                   pinned_table_.nbytes(), cudaMemcpyHostToDevice, stream));
    table_changed_ = false;
  }
  return pinned_table_;
}

kernels::DevicePages PagedKvCache::pages(std::int64_t layer) const {
  auto* data = static_cast<char*>(data_.mutable_data_ptr());
  auto* scales = static_cast<char*>(scales_.mutable_data_ptr());
  const std::int64_t slab = num_pages_ * page_bytes();
  const std::int64_t scale_slab = num_pages_ * page_scale_bytes();
  kernels::DevicePages pages{
      .keys = data + 2 * layer * slab, .values = data + (2 * layer + 1) * slab, .dtype = dtype_};
  if (scale_slab > 0) {
    pages.key_scales = reinterpret_cast<float*>(scales + 2 * layer * scale_slab);
    pages.value_scales = reinterpret_cast<float*>(scales + (2 * layer + 1) * scale_slab);
  }
  return pages;
}

std::int64_t PagedKvCache::layer_stride() const {
  return 2 * num_pages_ * num_kv_heads() * kPageTokens * head_dim();
}

void PagedKvCache::copy(std::int64_t from, std::int64_t to) {
  for (std::int64_t index = 0; index < pages_for(length(from)); ++index) {
    const std::int32_t page = page_of(from, index);
    page_of(to, index) = page;
    ++owners_[static_cast<std::size_t>(page)];
  }
  table_changed_ = true;
}

void PagedKvCache::forget(std::int64_t slot, std::int64_t length) {
  for (std::int64_t index = pages_for(length); index < pages_per_slot_; ++index) {
    std::int32_t& page = page_of(slot, index);
    if (page != kNoPage) {
      release_page(page);
      page = kNoPage;
    }
  }
}

}  // namespace moq::inference::cuda
