#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "inference/engine/aligned_buffer.h"

namespace moq::inference {

/// Keys and values of the tokens that a causal model has seen, for several sequences at once.
///
/// A sequence lives in a slot. Rows of a batch name slots, so that a batch may hold any choice of
/// them in any order, each with a length of its own. This class keeps the books; a device's own
/// keeps the numbers.
class KvCache {
 public:
  virtual ~KvCache() = default;
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  std::int64_t num_layers() const { return num_layers_; }
  std::int64_t num_kv_heads() const { return num_kv_heads_; }
  std::int64_t head_dim() const { return head_dim_; }
  std::int64_t num_slots() const { return static_cast<std::int64_t>(lengths_.size()); }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t num_free_slots() const;

  /// Takes a free slot for a new, empty sequence.
  /// @throws moq::Error if there is none
  std::int64_t allocate();
  /// Gives a sequence's slot back.
  void free(std::int64_t slot);
  /// Takes a free slot for a copy of a sequence, which then grows by itself.
  /// @throws moq::Error if there is none
  std::int64_t fork(std::int64_t slot);
  /// Row i continues what row sources[i] of `slots` held (beam search): slots are exchanged where a
  /// row has one heir, and copied only where it has several. Rows without an heir give up their
  /// sequences.
  /// @param slots  the rows' slots, rewritten
  /// @throws moq::Error, with nothing changed, unless the slots are used and distinct and the
  ///         sources are rows
  void reorder(std::span<std::int64_t> slots, std::span<const std::int64_t> sources);

  /// Whether a sequence lives in the slot.
  bool holds(std::int64_t slot) const;
  /// Tokens that a sequence holds.
  std::int64_t length(std::int64_t slot) const;
  /// Forgets the tokens from `length` on.
  /// @throws moq::Error unless 0 <= length <= length(slot)
  void truncate(std::int64_t slot, std::int64_t length);
  /// Counts tokens whose keys and values were written to every layer.
  /// @throws moq::Error if they don't fit
  void advance(std::int64_t slot, std::int64_t num_tokens);

  /// Bytes of keys and values, those of free slots included.
  virtual std::int64_t bytes() const = 0;

 protected:
  /// @param capacity  tokens a slot can hold
  /// @throws moq::Error if a size is < 1, or the cache would be larger than any memory
  KvCache(std::int64_t num_layers, std::int64_t num_kv_heads, std::int64_t head_dim,
          std::int64_t num_slots, std::int64_t capacity);

  void check_used(std::int64_t slot) const;

 private:
  /// Makes slot `to` hold the first length(from) tokens of slot `from`.
  virtual void copy(std::int64_t from, std::int64_t to) = 0;
  /// Called when a slot holds fewer tokens than before: `length` of them.
  virtual void forget(std::int64_t slot, std::int64_t length) = 0;

  std::int64_t num_layers_;
  std::int64_t num_kv_heads_;
  std::int64_t head_dim_;
  std::int64_t capacity_;
  std::vector<std::int64_t> lengths_;  ///< per slot; kFree if nobody has it
};

/// A cache for CPU kernels: memory for every slot's capacity, allocated at construction, of which
/// the system provides what is written. Per layer and slot [num_kv_heads, capacity, head_dim]
/// float32 for keys, and for values.
class HostKvCache final : public KvCache {
 public:
  /// @throws moq::Error as KvCache
  HostKvCache(std::int64_t num_layers, std::int64_t num_kv_heads, std::int64_t head_dim,
              std::int64_t num_slots, std::int64_t capacity);

  float* keys(std::int64_t layer) { return slab(layer, 0); }  ///< [slots, kv heads, capacity, dim]
  float* values(std::int64_t layer) { return slab(layer, 1); }  ///< the same
  std::int64_t bytes() const override { return static_cast<std::int64_t>(data_.size()); }

 private:
  float* slab(std::int64_t layer, std::int64_t which);
  void copy(std::int64_t from, std::int64_t to) override;
  void forget(std::int64_t /*slot*/, std::int64_t /*length*/) override {}

  AlignedBuffer data_;  ///< [layers, {keys, values}, slots, kv heads, capacity, dim]
};

}  // namespace moq::inference
