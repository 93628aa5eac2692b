#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <random>
#include <string>

#include "inference/checkpoint/checkpoint.h"
#include "inference/checkpoint/json.h"
#include "inference/checkpoint/safetensors.h"
#include "tests/cpp/checkpoint/crafted_file.h"

namespace {
std::atomic<std::size_t> live_bytes{0};
std::atomic<std::size_t> peak_bytes{0};
}  // namespace

// Every allocation of this binary passes here, so that tests can see what a hostile file made the
// reader allocate. AddressSanitizer brings operators of its own and tells them apart from malloc.
#if !defined(__SANITIZE_ADDRESS__)
[[gnu::noinline]] void* operator new(std::size_t size) {
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  const std::size_t live = live_bytes += malloc_usable_size(memory);
  std::size_t peak = peak_bytes.load();
  while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
  }
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  live_bytes -= malloc_usable_size(memory);
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  operator delete(memory);
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

/// Most bytes that were allocated at one time while `action` ran, beyond those before it.
template <typename Action>
std::size_t peak_of(const Action& action) {
  const std::size_t before = live_bytes.load();
  peak_bytes = before;
  action();
  return peak_bytes.load() - before;
}

/// `unit`, so often that the text has two megabytes.
std::string repeated(const std::string& unit) {
  std::string text;
  while (text.size() < 2'000'000) {
    text += unit;
  }
  return text;
}

/// A file that claims, or holds, much more than a checkpoint needs.
struct LargeClaim {
  const char* name;  ///< of the test
  std::string file_name;
  std::string bytes;
};

void PrintTo(const LargeClaim& claim, std::ostream* out) {
  *out << claim.name;
}

class LargeClaimFile : public testing::TestWithParam<LargeClaim> {};

TEST_P(LargeClaimFile, AllocatesNoMoreThanTheFileHolds) {
  const TemporaryDirectory directory;
  directory.write(GetParam().file_name, GetParam().bytes);
  const std::size_t peak =
      peak_of([&] { EXPECT_THROW(Checkpoint::open(directory.path()), Error); });
  EXPECT_LE(peak, GetParam().bytes.size() + 16'384);
}

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

INSTANTIATE_TEST_SUITE_P(
    All, LargeClaimFile,
    testing::Values(
        LargeClaim{"HeaderLength", kWeights, safetensors_bytes("{}", 0, 99'999'999)},
        LargeClaim{
            "Offsets", kWeights,
            safetensors_bytes(
                R"({"w":{"dtype":"F32","shape":[4294967296,64],"data_offsets":[0,1099511627776]}})",
                8)},
        LargeClaim{
            "Shape", kWeights,
            safetensors_bytes(R"({"w":{"dtype":"U8","shape":[1000000000],"data_offsets":[0,8]}})",
                              8)},
        LargeClaim{"UnfinishedTensor", kWeights,
                   safetensors_bytes("{\"" + std::string(3'000, 'n') + "\":[", 0)},
        LargeClaim{"ManyDimensions", kWeights,
                   safetensors_bytes(R"({"w":{"dtype":"U8","data_offsets":[0,1],"shape":[)" +
                                         repeated("1,") + "1]}}",
                                     1)},
        LargeClaim{"ManyOffsets", kWeights,
                   safetensors_bytes(R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[)" +
                                         repeated("0,") + "1]}}",
                                     1)},
        LargeClaim{"IndexOfAnArray", kIndex, "[" + repeated("0,") + "0]"},
        LargeClaim{"IndexWithLargeMetadata", kIndex,
                   R"({"metadata":[)" + repeated("0,") + R"(0],"weight_map":[]})"},
        LargeClaim{"IndexOfNumbers", kIndex, R"({"weight_map":[)" + repeated("0,") + "0]}"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Memory, IsInProportionToTheHeader) {
  const TemporaryDirectory directory;
  constexpr int kTensors = 20'000;
  std::string header = "{";
  for (int i = 0; i < kTensors; ++i) {
    header += "\"" + std::to_string(i) +
              R"(":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0],"data_offsets":[0,0]},)";
  }
  header.back() = '}';
  const auto path = directory.write("model.safetensors", safetensors_bytes(header, 0));
  EXPECT_LE(peak_of([&] { SafetensorsFile::open(path); }), 6 * header.size());
}

TEST(Memory, ReadsNoConfigBeyondItsLimit) {
  const TemporaryDirectory directory;
  const auto path = directory.write("config.json", std::string((4U << 20U) + 1, ' '));
  const std::size_t peak = peak_of([&] {
    EXPECT_EQ(error_of([&] { read_text_file(path); }),
              path.string() + ": expected at most 4194304 bytes, got 4194305");
  });
  EXPECT_LE(peak, 16'384U);
}

}  // namespace
}  // namespace moq::checkpoint
