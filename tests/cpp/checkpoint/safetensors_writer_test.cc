#include "inference/checkpoint/safetensors_writer.h"

#include <gtest/gtest.h>

#include <vector>

#include "inference/checkpoint/exchange.h"
#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::checkpoint {
namespace {

std::vector<std::byte> pattern(std::uint64_t size, int seed) {
  std::vector<std::byte> bytes(size);
  for (std::uint64_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<std::byte>(i * 7 + static_cast<std::uint64_t>(seed));
  }
  return bytes;
}

TEST(SafetensorsWriter, WritesWhatTheReaderReadsBack) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "a.safetensors";
  SafetensorsWriter writer(path,
                           {{.name = "scale", .dtype = "BF16", .shape = {3, 1}},
                            {.name = "packed", .dtype = "I32", .shape = {3, 2}},
                            {.name = "shape", .dtype = "I64", .shape = {2}},
                            {.name = "empty \"é\"", .dtype = "F32", .shape = {0}}},
                           {{"format", "pt"}});
  for (const TensorInfo& tensor : writer.tensors()) {
    writer.write(pattern(tensor.size_bytes(), static_cast<int>(tensor.name.size())));
  }
  writer.finish();
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  ASSERT_EQ(file.tensors().size(), 4U);
  for (const TensorInfo& tensor : file.tensors()) {
    const auto bytes = file.bytes(tensor);
    EXPECT_EQ(std::vector(bytes.begin(), bytes.end()),
              pattern(tensor.size_bytes(), static_cast<int>(tensor.name.size())));
  }
}

TEST(SafetensorsWriter, AlignsTheDataAndEveryElement) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "a.safetensors";
  SafetensorsWriter writer(path,
                           {{.name = "a", .dtype = "I8", .shape = {3}},
                            {.name = "b", .dtype = "F16", .shape = {5}},
                            {.name = "c", .dtype = "I64", .shape = {1}},
                            {.name = "d", .dtype = "F32", .shape = {3}}},
                           {});
  for (const TensorInfo& tensor : writer.tensors()) {
    EXPECT_EQ(tensor.begin % *item_size(tensor.dtype), 0U) << tensor.name;
    writer.write(pattern(tensor.size_bytes(), 0));
  }
  writer.finish();
  const auto file_size = std::filesystem::file_size(path);
  EXPECT_EQ((file_size - writer.tensors().back().end) % 64, 0U);
}

TEST(SafetensorsWriter, RefusesAWrongSizeAndAMissingTensor) {
  const TemporaryDirectory directory;
  SafetensorsWriter writer(directory.path() / "a.safetensors",
                           {{.name = "w", .dtype = "F32", .shape = {2}}}, {});
  EXPECT_NE(error_of([&] { writer.write(pattern(4, 0)); }).find("w: expected 8 bytes, got 4"),
            std::string::npos);
  EXPECT_NE(error_of([&] { writer.finish(); }).find("w was not written"), std::string::npos);
  writer.write(pattern(8, 0));
  EXPECT_THROW(writer.write(pattern(8, 0)), Error);
  writer.finish();
  EXPECT_THROW(writer.finish(), Error);
}

TEST(SafetensorsWriter, RefusesTensorsThatNoFileCanHold) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "a.safetensors";
  const auto create = [&](std::vector<TensorInfo> tensors) {
    return error_of([&] { SafetensorsWriter(path, std::move(tensors), {}); });
  };
  EXPECT_NE(create({{.name = "", .dtype = "F32", .shape = {}}}).find("a tensor's name"),
            std::string::npos);
  EXPECT_NE(create({{.name = "w", .dtype = "F3", .shape = {}}}).find("known dtype"),
            std::string::npos);
  EXPECT_NE(create({{.name = "w", .dtype = "F32", .shape = {-1}}}).find("dimensions >= 0"),
            std::string::npos);
  EXPECT_NE(create({{.name = "w", .dtype = "F32", .shape = {}},
                    {.name = "w", .dtype = "F32", .shape = {}}})
                .find("every tensor once"),
            std::string::npos);
}

TEST(SafetensorsWriter, NamesADirectoryThatDoesNotExist) {
  EXPECT_NE(error_of([] {
              SafetensorsWriter("/nonexistent/a.safetensors", {}, {});
            }).find("/nonexistent/a.safetensors: No such file"),
            std::string::npos);
}

TEST(Exchange, SwapsTwoDirectories) {
  const TemporaryDirectory directory;
  const auto first = directory.path() / "first";
  const auto second = directory.path() / "second";
  std::filesystem::create_directory(first);
  std::filesystem::create_directory(second);
  directory.write("first/a", "1");
  ASSERT_TRUE(exchange_paths(first, second));
  EXPECT_TRUE(std::filesystem::exists(second / "a"));
  EXPECT_TRUE(std::filesystem::is_empty(first));
}

TEST(Exchange, NamesBothPathsWhenOneIsMissing) {
  const TemporaryDirectory directory;
  EXPECT_THROW(exchange_paths(directory.path(), directory.path() / "none"), Error);
}

}  // namespace
}  // namespace moq::checkpoint
