#include "inference/engine/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

constexpr std::int64_t kFree = -1;

/// Bytes of a cache, or nullopt for more than a size can say.
std::optional<std::size_t> size_bytes(std::initializer_list<std::int64_t> sizes) {
  std::int64_t total = 2 * sizeof(float);  // keys and values
  for (const std::int64_t size : sizes) {
    if (__builtin_mul_overflow(total, size, &total)) {
      return std::nullopt;
    }
  }
  return static_cast<std::size_t>(total);
}

}  // namespace

KvCache::KvCache(std::int64_t num_layers, std::int64_t num_kv_heads, std::int64_t head_dim,
                 std::int64_t num_slots, std::int64_t capacity)
    : num_layers_(num_layers),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      capacity_(capacity) {
  MOQ_CHECK(
      num_layers >= 1 && num_kv_heads >= 1 && head_dim >= 1 && num_slots >= 1 && capacity >= 1,
      "kv cache: layers, kv heads, head_dim, slots and capacity must be >= 1, got ", num_layers,
      ", ", num_kv_heads, ", ", head_dim, ", ", num_slots, ", ", capacity);
  const auto size = size_bytes({num_layers, num_slots, num_kv_heads, capacity, head_dim});
  MOQ_CHECK(size.has_value(), "kv cache: layers, slots, kv heads, capacity and head_dim must fit ",
            "into memory, got ", num_layers, ", ", num_slots, ", ", num_kv_heads, ", ", capacity,
            ", ", head_dim);
  lengths_.assign(static_cast<std::size_t>(num_slots), kFree);
}

bool KvCache::holds(std::int64_t slot) const {
  return slot >= 0 && slot < num_slots() && lengths_[static_cast<std::size_t>(slot)] != kFree;
}

void KvCache::check_used(std::int64_t slot) const {
  MOQ_CHECK(holds(slot), "kv cache: a slot must be one of ", num_slots(),
            " and hold a sequence, got ", slot);
}

std::int64_t KvCache::num_free_slots() const {
  return std::count(lengths_.begin(), lengths_.end(), kFree);
}

std::int64_t KvCache::allocate() {
  const auto slot = std::find(lengths_.begin(), lengths_.end(), kFree);
  MOQ_CHECK(slot != lengths_.end(), "kv cache: a new sequence needs a free slot, got ", num_slots(),
            " slots in use: free one, or build the cache with more");
  *slot = 0;
  return slot - lengths_.begin();
}

void KvCache::free(std::int64_t slot) {
  check_used(slot);
  forget(slot, 0);
  lengths_[static_cast<std::size_t>(slot)] = kFree;
}

std::int64_t KvCache::fork(std::int64_t slot) {
  check_used(slot);
  const std::int64_t heir = allocate();
  copy(slot, heir);
  lengths_[static_cast<std::size_t>(heir)] = length(slot);
  return heir;
}

void KvCache::reorder(std::span<std::int64_t> slots, std::span<const std::int64_t> sources) {
  MOQ_CHECK(slots.size() == sources.size(), "kv cache: reorder must get one source per row, got ",
            sources.size(), " for ", slots.size());
  const std::vector<std::int64_t> before(slots.begin(), slots.end());
  for (auto slot = before.begin(); slot != before.end(); ++slot) {
    check_used(*slot);
    MOQ_CHECK(std::find(before.begin(), slot, *slot) == slot,
              "kv cache: the rows of a reorder must have a slot each, got slot ", *slot, " twice");
  }
  std::vector<bool> has_heir(slots.size(), false);
  for (const std::int64_t source : sources) {
    MOQ_CHECK(source >= 0 && static_cast<std::size_t>(source) < slots.size(),
              "kv cache: a reorder source must be a row of ", slots.size(), ", got ", source);
    has_heir[static_cast<std::size_t>(source)] = true;
  }
  for (std::size_t row = 0; row < slots.size(); ++row) {
    if (!has_heir[row]) {
      free(before[row]);
    }
  }
  std::vector<bool> taken(slots.size(), false);
  for (std::size_t row = 0; row < slots.size(); ++row) {
    const auto source = static_cast<std::size_t>(sources[row]);
    slots[row] = taken[source] ? fork(before[source]) : before[source];
    taken[source] = true;
  }
}

std::int64_t KvCache::length(std::int64_t slot) const {
  check_used(slot);
  return lengths_[static_cast<std::size_t>(slot)];
}

void KvCache::truncate(std::int64_t slot, std::int64_t length) {
  MOQ_CHECK(length >= 0 && length <= this->length(slot),
            "kv cache: truncate must shorten a "
            "sequence of ",
            this->length(slot), " tokens, got ", length);
  forget(slot, length);
  lengths_[static_cast<std::size_t>(slot)] = length;
}

void KvCache::advance(std::int64_t slot, std::int64_t num_tokens) {
  const std::int64_t length = this->length(slot) + num_tokens;
  MOQ_CHECK(num_tokens >= 0 && length <= capacity_, "kv cache: a sequence must fit into ",
            capacity_, " tokens, got ", length);
  lengths_[static_cast<std::size_t>(slot)] = length;
}

HostKvCache::HostKvCache(std::int64_t num_layers, std::int64_t num_kv_heads, std::int64_t head_dim,
                         std::int64_t num_slots, std::int64_t capacity)
    : KvCache(num_layers, num_kv_heads, head_dim, num_slots, capacity),
      data_(2 * sizeof(float) *
            static_cast<std::size_t>(num_layers * num_slots * num_kv_heads * capacity * head_dim)) {
}

float* HostKvCache::slab(std::int64_t layer, std::int64_t which) {
  return data_.as<float>() +
         (layer * 2 + which) * num_slots() * num_kv_heads() * capacity() * head_dim();
}

void HostKvCache::copy(std::int64_t from, std::int64_t to) {
  const std::int64_t used = length(from);
  const std::int64_t head = capacity() * head_dim();
  for (std::int64_t slab_index = 0; slab_index < num_layers() * 2; ++slab_index) {
    float* data = slab(slab_index / 2, slab_index % 2);
    for (std::int64_t h = 0; h < num_kv_heads(); ++h) {
      std::memcpy(data + (to * num_kv_heads() + h) * head,
                  data + (from * num_kv_heads() + h) * head,
                  sizeof(float) * static_cast<std::size_t>(used * head_dim()));
    }
  }
}

}  // namespace moq::inference
