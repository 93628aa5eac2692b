#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <random>
#include <string>

#include "inference/checkpoint/json.h"
#include "inference/checkpoint/safetensors.h"
#include "tests/cpp/checkpoint/crafted_file.h"

namespace {
std::atomic<std::size_t> largest_allocation{0};
}  // namespace

// Every allocation of this binary passes here, so that tests can see what a hostile file made the
// reader allocate. AddressSanitizer brings operators of its own and tells them apart from malloc.
#if !defined(__SANITIZE_ADDRESS__)
[[gnu::noinline]] void* operator new(std::size_t size) {
  std::size_t largest = largest_allocation.load();
  while (size > largest && !largest_allocation.compare_exchange_weak(largest, size)) {
  }
  if (void* memory = std::malloc(size == 0 ? 1 : size)) {
    return memory;
  }
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
#endif

namespace moq::checkpoint {
namespace {

/// A valid file with the features of a real one: metadata, several dtypes, an empty tensor,
/// padding.
std::string valid_file() {
  return safetensors_bytes(
      R"({"__metadata__":{"format":"pt"},)"
      R"("model.layers.0.mlp.up_proj.weight_packed":{"dtype":"I32","shape":[4,2],"data_offsets":[0,32]},)"
      R"("model.layers.0.mlp.up_proj.weight_scale":{"dtype":"BF16","shape":[4,1],"data_offsets":[32,40]},)"
      R"("model.layers.0.mlp.up_proj.weight_shape":{"dtype":"I64","shape":[2],"data_offsets":[40,56]},)"
      R"("empty":{"dtype":"F32","shape":[0],"data_offsets":[56,56]},)"
      R"("model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[56,64]}}   )",
      64);
}

/// One of: flip a bit, overwrite a byte, insert, delete, duplicate a stretch, truncate, swap a
/// digit.
void mutate(std::string& bytes, std::mt19937_64& random) {
  const auto below = [&](std::size_t size) { return size == 0 ? 0 : random() % size; };
  const std::size_t at = below(bytes.size());
  switch (random() % 8) {
    case 0:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << (random() % 8)));
      break;
    case 1:
      bytes[at] = static_cast<char>(random());
      break;
    case 2:
      bytes.insert(at, 1, "{}[]\",:-0129eE.\\u "[random() % 18]);
      break;
    case 3:
      bytes.erase(at, 1 + below(8));
      break;
    case 4:
      bytes.insert(below(bytes.size()), bytes.substr(at, 1 + below(64)));
      break;
    case 5:
      bytes.resize(at);
      break;
    case 6: {
      const std::size_t digit = bytes.find_first_of("0123456789", at);
      if (digit != std::string::npos) {
        bytes[digit] = static_cast<char>('0' + random() % 10);
      }
      break;
    }
    default: {  // keep the header's length true, so that mutations reach past the first check
      const std::uint64_t length = bytes.size() > 72 ? bytes.size() - 72 : 0;
      std::memcpy(bytes.data(), &length, std::min<std::size_t>(8, bytes.size()));
    }
  }
  if (bytes.empty()) {
    bytes = "x";
  }
}

/// Reads everything that the reader says is there: a wrong bound is a fault under ASAN.
std::size_t touch_everything(const SafetensorsFile& file) {
  std::size_t sum = 0;
  for (const TensorInfo& tensor : file.tensors()) {
    for (const std::byte byte : file.bytes(tensor)) {
      sum += static_cast<std::size_t>(byte);
    }
  }
  return sum;
}

TEST(Mutation, EveryMutatedFileIsReadOrRefusedWithoutAFault) {
  const TemporaryDirectory directory;
  std::mt19937_64 random(20260101);
  const std::string valid = valid_file();
  int refused = 0;
  int read = 0;
  for (int i = 0; i < 6'000; ++i) {
    std::string bytes = valid;
    const int mutations = 1 + static_cast<int>(random() % 4);
    for (int mutation = 0; mutation < mutations; ++mutation) {
      mutate(bytes, random);
    }
    const auto path = directory.write("mutated.safetensors", bytes);
    try {
      touch_everything(SafetensorsFile::open(path));
      ++read;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("mutated.safetensors"), std::string::npos);
      ++refused;
    }
  }
  // Both outcomes must be common, or the mutations test nothing.
  EXPECT_GT(refused, 2'000);
  EXPECT_GT(read, 100);
}

TEST(Mutation, EveryMutatedJsonIsReadOrRefusedWithoutAFault) {
  std::mt19937_64 random(7);
  const std::string valid =
      R"({"num_bits": 8, "groups": [{"a": -1.5e3, "b": [true, null]}, "\u00e9\ud83d\ude00"]})";
  int read = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = valid;
    mutate(text, random);
    try {
      const std::string dumped = Json::parse(text, "mutated").dump();
      EXPECT_EQ(Json::parse(dumped, "dumped").dump(), dumped);
      ++read;
    } catch (const Error&) {
      continue;
    }
  }
  EXPECT_GT(read, 500);
}

/// Claims of gigabytes in a file of a few hundred bytes.
class LargeClaim : public testing::TestWithParam<std::string> {};

TEST_P(LargeClaim, AllocatesNoMoreThanTheFileHolds) {
  const TemporaryDirectory directory;
  const auto path = directory.write("claim.safetensors", GetParam());
  largest_allocation = 0;
  EXPECT_THROW(SafetensorsFile::open(path), Error);
  EXPECT_LE(largest_allocation.load(), GetParam().size() + 4096);
}

INSTANTIATE_TEST_SUITE_P(
    All, LargeClaim,
    testing::Values(
        safetensors_bytes("{}", 0, 99'999'999),
        safetensors_bytes(
            R"({"w":{"dtype":"F32","shape":[4294967296,64],"data_offsets":[0,1099511627776]}})", 8),
        safetensors_bytes(R"({"w":{"dtype":"U8","shape":[1000000000],"data_offsets":[0,8]}})", 8),
        safetensors_bytes("{\"" + std::string(3'000, 'n') + "\":[", 0)));

}  // namespace
}  // namespace moq::checkpoint
