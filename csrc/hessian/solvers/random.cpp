#include "csrc/hessian/solvers/random.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "kernels/common/check.h"
#include "kernels/common/philox.h"

namespace moq::hessian {

namespace {

/// 128 random bits for the `index`-th block of a vector.
PhiloxBlock draw(const RandomStream& stream, std::size_t index) {
  return philox4x32(
      {{static_cast<std::uint32_t>(index), stream.tensor, stream.probe, stream.batch}},
      stream.seed);
}

void check_length(std::size_t length, std::size_t per_draw) {
  MOQ_CHECK((length + per_draw - 1) / per_draw <= std::size_t{1} << 32,
            "random vector: it must need at most 2^32 draws of ", per_draw, " elements, got ",
            length, " elements");
}

/// The eight signs that the bits of each byte stand for, lowest bit first.
template <typename Scalar>
constexpr auto kSigns = [] {
  std::array<std::array<Scalar, 8>, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      table[byte][bit] = (byte >> bit & 1U) != 0U ? Scalar{1} : Scalar{-1};
    }
  }
  return table;
}();

template <typename Scalar>
void fill_signs(std::span<Scalar> values, const RandomStream& stream) {
  constexpr std::size_t kPerDraw = 128;
  check_length(values.size(), kPerDraw);
  for (std::size_t begin = 0; begin < values.size(); begin += kPerDraw) {
    const PhiloxBlock bits = draw(stream, begin / kPerDraw);
    std::array<std::array<Scalar, 8>, kPerDraw / 8> signs;
    for (std::size_t i = 0; i < signs.size(); ++i) {
      signs[i] = kSigns<Scalar>[bits.word[i / 4] >> (8 * (i % 4)) & 0xffU];
    }
    std::memcpy(&values[begin], signs.data(),
                sizeof(Scalar) * std::min(kPerDraw, values.size() - begin));
  }
}

}  // namespace

void fill_rademacher(std::span<float> values, const RandomStream& stream) {
  fill_signs(values, stream);
}

void fill_rademacher(std::span<double> values, const RandomStream& stream) {
  fill_signs(values, stream);
}

template <typename Scalar>
void fill_uniform(std::span<Scalar> values, const RandomStream& stream) {
  constexpr std::size_t kPerDraw = 4;
  check_length(values.size(), kPerDraw);
  for (std::size_t begin = 0; begin < values.size(); begin += kPerDraw) {
    const PhiloxBlock bits = draw(stream, begin / kPerDraw);
    const std::size_t count = std::min(kPerDraw, values.size() - begin);
    for (std::size_t i = 0; i < count; ++i) {
      values[begin + i] = static_cast<Scalar>(2.0F * uniform_from_word(bits.word[i]) - 1.0F);
    }
  }
}

template void fill_uniform<float>(std::span<float>, const RandomStream&);
template void fill_uniform<double>(std::span<double>, const RandomStream&);

}  // namespace moq::hessian
