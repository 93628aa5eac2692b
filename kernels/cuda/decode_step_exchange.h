#pragma once

#include "kernels/cuda/decode_step_layout.h"
#include "kernels/cuda/vectors.h"

/// How the thread blocks of a decode step tell each other their results. Device code only.
///
/// What is told is words of 64 bits in global memory, four numbers of 16 bits each (or two of 32),
/// written and read as a whole: relaxed accesses at the scope of the GPU. A word is its own flag:
/// while its upper half begins with 0xffff it is not there yet, and readers ask again. That is a
/// NaN that no result is rounded to; `told` makes sure. Nothing else rides on a word, so that
/// readers need no order between words.
///
/// A layer's words lie in a slot; layer n, counted over all steps, has slot n % kSlots. The thread
/// that writes a word of layer n also clears the same word for layer n + kClearAhead, so that a
/// word's clearing and its next writing come from one thread and can't overtake each other. Two
/// things must not happen: that a reader of layer n still finds what was there before the clearing,
/// of layer n - kSlots; and that it misses its word because the next clearing came first. Fences
/// see to that. Ahead of the up projection, which every thread block has rows of, the block meets:
/// a barrier of its threads, then a fence by each (`meet`), then the next barrier, which the up
/// projection's norm has. Call the three M(c, n) for block c and layer n. Between fences and second
/// barrier lies one access only, the reading of x behind the attention, which counts as before M.
///
/// A thread's fence, a word that it writes later, the reading of it, and the reader's next fence
/// order what lies before the first before what lies behind the second; the barriers make this true
/// of blocks. Therefore
///
///   before M(c, n) comes before all behind M(o, n + 1), for any block c and each block o that has
///   rows of the down projection: o reads inner numbers of layer n, of which c writes some;
///   and that comes before all behind M(d, n + 3), for any block d: it reads x behind the attention
///   of layer n + 2, which the blocks o write.
///
/// - Old words. Those of layer n were cleared in layer n - 4, before M(c, n - 3): seen behind
///   M(d, n), where inner numbers and x at the layer's end are read. q, k, v, the attention's
///   parts and x behind the attention were cleared before M(c, n - 4): seen behind M(d, n - 1), and
///   read there.
/// - Early clearings. Words of layer n are read in it, x at its end in the next one: before
///   M(d, n + 1), which comes before what lies behind M(c, n + 4), where inner numbers are cleared
///   for layer n + 8. q, k, v and the attention's parts are read before M(d, n), and cleared behind
///   M(c, n + 3). x is cleared by blocks o, behind M(o, n + 3); what is read before M(d, n + 1)
///   comes before all behind M(o, n + 2).
///
/// The stream orders steps. A step needs the slots that it begins with to be cleared, as the layers
/// before have left them, or `prepare_decode_step`. (A step that is aborted has no next one: the
/// trap of `Patience` ends the process's use of the GPU.)
namespace moq::kernels::cuda::step {

constexpr int kSlots = 8;
constexpr int kClearAhead = 4;
/// Copies of what all thread blocks read: polls of one by all of them would wait for each other.
constexpr int kCopies = 4;
constexpr std::uint32_t kClear = 0xffffffffU;

/// Bytes of a slot, whose parts begin where the widest hidden size of `kRounds` has them.
template <int kRounds>
struct Slot {
  static constexpr int kRow = kRounds * kWarps * kBlockCols * 2;
  static constexpr int kMiddle = 0;  ///< x behind the attention
  static constexpr int kEnd = kRow;  ///< x behind the feed-forward block
  static constexpr int kInner = 2 * kRow;
  static constexpr int kQkv = kInner + kPieces * kRow;        ///< one copy of it is used
  static constexpr int kAttended = kQkv + 3 * kRow;           ///< [splits][heads]
  static constexpr int kShares = kAttended + kSplits * kRow;  ///< [heads][splits]
  static constexpr int kBytes = (kShares + kRow / kHeadBytes * kSplits * 8 + 127) / 128 * 128;
  static constexpr int kCopyBytes = kBytes * kSlots;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ std::uint64_t whole(const uint2& word) {
  return word.x | static_cast<std::uint64_t>(word.y) << 32;
}
__device__ __forceinline__ uint2 halves(std::uint64_t word) {
  return {static_cast<std::uint32_t>(word), static_cast<std::uint32_t>(word >> 32)};
}

__device__ __forceinline__ void tell(char* address, const uint2& word) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(whole(word)) : "memory");
}

/// Tells a word of this layer, and clears that of a later one.
__device__ __forceinline__ void tell_and_clear(char* address, std::uint32_t slot,
                                               std::uint32_t cleared_slot, const uint2& word) {
  tell(address + slot, word);
  tell(address + cleared_slot, {kClear, kClear});
}

/// Words of four 16-bit numbers, and of two float32 ones, are not there from these on.
constexpr std::uint32_t kNoNumbers = 0xffff0000U;
constexpr std::uint32_t kNoFloats = kClear;

/// Reads a word if it was not there.
template <std::uint32_t kAbsentFrom>
__device__ __forceinline__ void ask(uint2& word, const char* address) {
  std::uint64_t value = whole(word);
  asm volatile("{ .reg .pred p; setp.ge.u32 p, %1, %3; @p ld.relaxed.gpu.global.b64 %0, [%2]; }"
               : "+l"(value)
               : "r"(word.y), "l"(address), "n"(kAbsentFrom)
               : "memory");
  word = halves(value);
}

/// Reads two words.
__device__ __forceinline__ uint4 ask_pair(const char* address) {
  std::uint64_t low;
  std::uint64_t high;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(low), "=l"(high)
               : "l"(address)
               : "memory");
  const uint2 first = halves(low);
  const uint2 second = halves(high);
  return {first.x, first.y, second.x, second.y};
}
__device__ __forceinline__ bool absent(const uint4& pair) {
  return pair.y >= kNoNumbers || pair.w >= kNoNumbers;
}

/// Ends the launch instead of asking for ever. It counts questions, each of which takes about half
/// a microsecond, not time: where a GPU is shared in turns, or a debugger stops it, both stand
/// still.
class Patience {
 public:
  /// Whether a warp must ask again, if any of its lanes must. (A vote, not the lane's own answer:
  /// a warp whose lanes leave a loop one by one takes a slow path through every shuffle behind it.)
  __device__ __forceinline__ bool again(bool absent) {
    if (!__any_sync(kWholeWarp, absent)) {
      return false;
    }
    if (--left_ < 0) {
      __trap();
    }
    return true;
  }

 private:
  int left_ = 1 << 23;
};

/// A barrier of the warps that multiply.
__device__ __forceinline__ void meet_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

/// The first two thirds of M in the note above.
__device__ __forceinline__ void meet() {
  meet_consumers();
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

/// The bits of a number of dtype, of which none is that of a word that is not there.
template <typename Element>
__device__ __forceinline__ std::uint32_t told(float value) {
  constexpr std::uint32_t kNan = 0x7fffU;
  const std::uint32_t bits = rounded_pair<Element>(value, 0.0F);
  return bits == 0xffffU ? kNan : bits;
}
__device__ __forceinline__ std::uint32_t told_float(float value) {
  constexpr std::uint32_t kNan = 0x7fffffffU;
  const std::uint32_t bits = __float_as_uint(value);
  return bits == kClear ? kNan : bits;
}

/// The word of four neighbouring lanes' numbers, in each of them.
__device__ __forceinline__ uint2 word_of_lanes(std::uint32_t bits, int lane) {
  const std::uint32_t other = __shfl_xor_sync(kWholeWarp, bits, 1);
  const std::uint32_t pair = (lane & 1) != 0 ? (bits << 16 | other) : (other << 16 | bits);
  const std::uint32_t other_pair = __shfl_xor_sync(kWholeWarp, pair, 2);
  return (lane & 2) != 0 ? make_uint2(other_pair, pair) : make_uint2(pair, other_pair);
}

template <typename Element>
__device__ __forceinline__ void numbers_of_word(const uint2& word, float (&numbers)[4]) {
  const float2 first = numbers_of_pair<Element>(word.x);
  const float2 second = numbers_of_pair<Element>(word.y);
  numbers[0] = first.x;
  numbers[1] = first.y;
  numbers[2] = second.x;
  numbers[3] = second.y;
}

#endif

}  // namespace moq::kernels::cuda::step
