#pragma once

#include <cstdint>
#include <string_view>

namespace moq {

/// 32-bit FNV-1a of a parameter's name: the same in every process, on every rank and machine.
/// Source: Fowler, Noll, Vo, http://www.isthe.com/chongo/tech/comp/fnv.
constexpr std::uint32_t name_hash(std::string_view name) {
  std::uint32_t hash = 2166136261U;
  for (const char character : name) {
    hash = (hash ^ static_cast<unsigned char>(character)) * 16777619U;
  }
  return hash;
}

}  // namespace moq
