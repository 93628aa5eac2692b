#pragma once

#include <cstdint>

#include "kernels/cpu/simd/group_grids.h"
#include "kernels/cpu/simd/random_draws.h"
#include "kernels/cpu/simd/vector.h"

/// Runs over contiguous elements: what fake-quantize does once the grids are known. Each writes
/// element i of `output` from element i of `input` by the grid that `grids` gives for i.
namespace moq::kernels::cpu::MOQ_ISA {

/// Draws and blending of one run of elements.
struct Run {
  std::int64_t size;
  const std::uint16_t* draws;  ///< readable up to a whole vector past size; null: nearest
  float blend_ratio;
  bool sign_codes;  ///< by the grids' thresholds; then draws is null
  /// Elements from one that is read to one that is asked to come into the caches meanwhile.
  std::int64_t ahead;
};

/// Asks for what lies `elements` after `input`, which may be past the end: an integer until then,
/// because no pointer may go there.
template <typename Element>
[[gnu::always_inline]] inline void prefetch(const Element* input, std::int64_t elements) {
  const auto address = reinterpret_cast<std::uintptr_t>(input) +
                       static_cast<std::uintptr_t>(elements) * sizeof(Element);
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  __builtin_prefetch(reinterpret_cast<const void*>(address), /*rw=*/0, /*locality=*/3);
}

/// Elements before one whose address a streaming store accepts.
template <typename Output>
[[gnu::always_inline]] inline std::int64_t elements_to_alignment(const Output* output) {
  constexpr std::uintptr_t kAlignment = kWidth * sizeof(Output);
  const std::uintptr_t misalignment = reinterpret_cast<std::uintptr_t>(output) % kAlignment;
  return static_cast<std::int64_t>((kAlignment - misalignment) % kAlignment / sizeof(Output));
}

/// Calls body(element, count) for vectors of a run: `count` is kWidth except at a start that brings
/// `output` to an address a streaming store accepts, and at the end.
template <bool kStream, typename Output, typename Body>
[[gnu::always_inline]] inline void for_each_vector(const Output* output, std::int64_t size,
                                                   const Body& body) {
  std::int64_t i = 0;
  if constexpr (kStream) {
    const std::int64_t head = elements_to_alignment(output);
    i = head < size ? head : size;
    if (i > 0) {
      body(std::int64_t{0}, i);
    }
  }
  for (; i + kWidth <= size; i += kWidth) {
    body(i, std::int64_t{kWidth});
  }
  if (i < size) {
    body(i, size - i);
  }
}

/// A vector of which `count` elements are read; the others are 0.
template <typename Element>
[[gnu::always_inline]] inline F32 load_some(const Element* input, std::int64_t count) {
  if (count == kWidth) {
    return load(input);
  }
  Element padded[kWidth] = {};
  std::memcpy(padded, input, static_cast<std::size_t>(count) * sizeof(Element));
  return load(padded);
}

template <bool kStream, typename Element>
[[gnu::always_inline]] inline void store_some(Element* output, F32 value, std::int64_t count) {
  if (count != kWidth) {
    Element padded[kWidth];
    store(padded, value);
    std::memcpy(output, padded, static_cast<std::size_t>(count) * sizeof(Element));
  } else if constexpr (kStream) {
    stream(output, value);
  } else {
    store(output, value);
  }
}

/// Codes as float32; kPlain promises nearest rounding.
template <bool kPlain>
[[gnu::always_inline]] inline F32 quantize(F32 value, const VectorGrid& grid, const Run& run,
                                           std::int64_t element) {
  if (!kPlain && run.sign_codes) {
    return quantize_sign(value, grid);
  }
  if (kPlain || run.draws == nullptr) {
    return quantize_nearest(value, grid);
  }
  return quantize_stochastic(value, grid, convert<I32>(load_bits<U16>(run.draws + element)));
}

/// kPlain promises nearest rounding and no blending: the usual step, kept free of all questions.
template <bool kPlain, bool kStream, typename Input, typename Output, typename Grids>
inline void fake_quantize_run(const Input* input, Output* output, const Grids& grids,
                              const Run& run) {
  for_each_vector<kStream>(
      output, run.size, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
        const VectorGrid grid = grids.at(i);
        prefetch(input + i, run.ahead);
        const F32 value = load_some(input + i, count);
        F32 result = dequantize(quantize<kPlain>(value, grid, run, i), grid);
        if (!kPlain && run.blend_ratio != 0.0F) {
          const F32 blended = run.blend_ratio * value + (1.0F - run.blend_ratio) * result;
          result = grid.scale == grid.scale ? blended : grid.scale;  // NaN: as without blending
        }
        store_some<kStream>(output + i, result, count);
      });
}

/// Asks for a line of the next page if `size` elements from `output` on begin a page. Stores past
/// the caches wait for the address of a page that was not written lately, and soon all else waits
/// for them. One line in a page costs little, though it is read for nothing.
template <typename Output>
[[gnu::always_inline]] inline void prefetch_page(const Output* output, std::int64_t size) {
  constexpr std::uintptr_t kPage = 4096;
  const auto bytes = static_cast<std::uintptr_t>(size) * sizeof(Output);
  if (reinterpret_cast<std::uintptr_t>(output) % kPage < bytes) {
    prefetch(output, static_cast<std::int64_t>(kPage / sizeof(Output)));
  }
}

/// Rounds a run stochastically without blending. `size` is a multiple of kDrawn and not 0; the
/// first element's draw is the first of block `lower_number`; kStream promises that `output` is
/// aligned for streaming stores. Elements are rounded while the next ones' are drawn.
template <bool kStream, typename Input, typename Output>
inline void fake_quantize_drawn(const Input* input, Output* output, std::int64_t size,
                                const VectorGrid& grid, const RandomBlocks& blocks,
                                std::uint32_t lower_number, std::int64_t ahead) {
  I32 words[kDrawnWords];
  const auto round_vector = [&](std::int64_t begin, int i) MOQ_INLINE_LAMBDA {
    const std::int64_t place = begin + i * kWidth;
    prefetch(input + place, ahead);
    const F32 code = quantize_stochastic(load(input + place), grid, draws_of(words, i));
    store_some<kStream>(output + place, dequantize(code, grid), kWidth);
  };
  blocks.draw<kBatches>(lower_number, words, Nothing());
  const std::int64_t last = size - kDrawn;
  if constexpr (kStream) {
    prefetch_page(output + last, kDrawn);
  }
  for (std::int64_t begin = 0; begin < last; begin += kDrawn) {
    lower_number += kDrawn / kPhiloxHalves;
    if constexpr (kStream) {
      prefetch_page(output + begin, kDrawn);
    }
    I32 next[kDrawnWords];
    blocks.draw<kBatches>(lower_number, next,
                          [&](int i) MOQ_INLINE_LAMBDA { round_vector(begin, i); });
#pragma GCC unroll 8
    for (int i = 0; i < kDrawnWords; ++i) {
      words[i] = next[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kDrawnVectors; ++i) {
    round_vector(last, i);
  }
}

/// Codes of a run; 0 where the group has no grid.
template <typename Input, typename Code, typename Grids>
inline void quantize_run(const Input* input, Code* codes, const Grids& grids, const Run& run) {
  for_each_vector<false>(
      codes, run.size, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
        const VectorGrid grid = grids.at(i);
        const F32 code = quantize<false>(load_some(input + i, count), grid, run, i);
        Code padded[kWidth];
        store(padded, convert<I32>(grid.scale == grid.scale ? code : F32{}));
        std::memcpy(codes + i, padded, static_cast<std::size_t>(count) * sizeof(Code));
      });
}

template <bool kStream, typename Input, typename Output>
inline void convert_run(const Input* input, Output* output, std::int64_t size) {
  for_each_vector<kStream>(output, size, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
    store_some<kStream>(output + i, load_some(input + i, count), count);
  });
}

}  // namespace moq::kernels::cpu::MOQ_ISA
