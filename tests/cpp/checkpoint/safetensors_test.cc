#include "inference/checkpoint/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::checkpoint {
namespace {

/// Header entry of one tensor.
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}

TEST(Safetensors, ReadsNamesShapesAndBytes) {
  const TemporaryDirectory directory;
  const auto path = directory.write(
      "a.safetensors", safetensors_bytes("{\"__metadata__\":{\"format\":\"pt\"}," +
                                             entry("b", "U8", "[3]", "[8,11]") + "," +
                                             entry("a", "F32", "[2,1]", "[0,8]") + "}  ",
                                         11));
  const SafetensorsFile file = SafetensorsFile::open(path);
  ASSERT_EQ(file.tensors().size(), 2U);
  EXPECT_EQ(file.tensors()[0].name, "a");  // in the order of the bytes
  EXPECT_EQ(file.tensors()[0].shape, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  const TensorInfo* b = file.find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->dtype, "U8");
  EXPECT_EQ(file.bytes(*b).size(), 3U);
  EXPECT_EQ(file.bytes(*b)[0], std::byte{8});
  EXPECT_EQ(file.find("c"), nullptr);
}

TEST(Safetensors, ReadsScalarsAndEmptyTensors) {
  const TemporaryDirectory directory;
  const auto path = directory.write(
      "a.safetensors", safetensors_bytes("{" + entry("empty", "F32", "[0,7]", "[0,0]") + "," +
                                             entry("scalar", "F64", "[]", "[0,8]") + "," +
                                             entry("last", "I8", "[0]", "[8,8]") + "}",
                                         8));
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(file.bytes(*file.find("scalar")).size(), 8U);
  EXPECT_TRUE(file.bytes(*file.find("empty")).empty());
  EXPECT_TRUE(file.bytes(*file.find("last")).empty());
}

TEST(Safetensors, ReadsAFileWithoutTensors) {
  const TemporaryDirectory directory;
  EXPECT_TRUE(SafetensorsFile::open(directory.write("a.safetensors", safetensors_bytes("{}", 0)))
                  .tensors()
                  .empty());
}

TEST(Safetensors, NamesFileTensorExpectedAndFound) {
  const TemporaryDirectory directory;
  const auto path = directory.write(
      "a.safetensors", safetensors_bytes("{" + entry("w", "F32", "[3,4]", "[0,12]") + "}", 12));
  EXPECT_EQ(error_of([&] { SafetensorsFile::open(path); }),
            path.string() + ": w: expected 48 bytes for F32 [3, 4], got 12");
}

TEST(Safetensors, RefusesAMissingFileADirectoryAndAPipe) {
  const TemporaryDirectory directory;
  EXPECT_THROW(SafetensorsFile::open(directory.path() / "none.safetensors"), Error);
  EXPECT_THROW(SafetensorsFile::open(directory.path()), Error);
  const auto pipe = directory.path() / "pipe.safetensors";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THROW(SafetensorsFile::open(pipe), Error);
}

TEST(Safetensors, OpensAHeaderOfManyTensorsInLinearTime) {
  const TemporaryDirectory directory;
  std::string header = "{";
  constexpr int kTensors = 20'000;
  for (int i = 0; i < kTensors; ++i) {
    header +=
        (i > 0 ? "," : "") + entry("t" + std::to_string(i), "U8", "[1]",
                                   "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]");
  }
  const auto path = directory.write("a.safetensors", safetensors_bytes(header + "}", kTensors));
  EXPECT_EQ(SafetensorsFile::open(path).tensors().size(), static_cast<std::size_t>(kTensors));
}

/// A file that must be refused, and words that its error must contain.
struct Hostile {
  const char* name;
  std::string bytes;
  const char* error;
};

void PrintTo(const Hostile& hostile, std::ostream* out) {
  *out << hostile.name;
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets,
                std::size_t data_size) {
  return safetensors_bytes("{" + entry("w", dtype, shape, offsets) + "}", data_size);
}

std::string two(const std::string& first, const std::string& second, std::size_t data_size) {
  return safetensors_bytes(
      "{" + entry("a", "U8", "[4]", first) + "," + entry("b", "U8", "[4]", second) + "}",
      data_size);
}

std::string body(const std::string& tensor_object) {
  return safetensors_bytes("{\"w\":" + tensor_object + "}", 4);
}

std::vector<Hostile> hostile_files() {
  const std::string valid = one("F32", "[1]", "[0,4]", 4);
  const std::string huge = std::to_string(std::uint64_t{1} << 62);
  return {
      {"Empty", "", "at least 8 bytes"},
      {"ShorterThanTheLength", std::string(7, '\0'), "at least 8 bytes"},
      {"LengthOnly", std::string("\x02\0\0\0\0\0\0\0", 8), "a header of 2 bytes"},
      {"HeaderLengthOfAllOnes", std::string(8, '\xff') + "{}", "at most 100000000 bytes"},
      {"HeaderLongerThanTheLimit", safetensors_bytes("{}", 0, 100'000'001), "at most 100000000"},
      {"HeaderLongerThanTheFile", safetensors_bytes("{}", 0, 3), "a header of 3 bytes"},
      {"HeaderLengthZero", safetensors_bytes("{}", 0, 0), "start with '{'"},
      {"HeaderCutShort", safetensors_bytes("{}", 0, 1), "end of the text"},
      {"TruncatedData", valid.substr(0, valid.size() - 1), "within the 3 bytes"},
      {"TrailingData", valid + "x", "expected 4 bytes of data, got 5"},
      {"LeadingSpace", safetensors_bytes(" {}", 0), "start with '{'"},
      {"HeaderIsAnArray", safetensors_bytes("[]", 0), "start with '{'"},
      {"TextAfterTheHeader", safetensors_bytes("{}x", 0), "end of the text, got 'x'"},
      {"ZeroPadding", safetensors_bytes(std::string_view("{}\0", 3), 0), "got byte 0x00"},
      {"NotUtf8", safetensors_bytes("{\"\xff\":{}}", 0), "UTF-8"},
      {"TensorIsANumber", body("1"), "an object"},
      {"TensorIsNull", body("null"), "an object"},
      {"EmptyTensorObject", body("{}"), "no dtype"},
      {"NoShape", body(R"({"dtype":"F32","data_offsets":[0,4]})"), "no shape"},
      {"NoOffsets", body(R"({"dtype":"F32","shape":[1]})"), "no data_offsets"},
      {"UnknownKey", body(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":0})"), "'x'"},
      {"DtypeTwice", body(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
       "'dtype' again"},
      {"ShapeTwice", body(R"({"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]})"),
       "'shape' again"},
      {"OffsetsTwice",
       body(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]})"),
       "'data_offsets' again"},
      {"OneOffset", one("F32", "[1]", "[0]", 4), "two data_offsets, got 1"},
      {"ThreeOffsets", one("F32", "[1]", "[0,4,4]", 4), "two data_offsets, got more"},
      {"NoOffsetAtAll", one("F32", "[1]", "[]", 4), "two data_offsets, got 0"},
      {"UnknownDtype", one("F31", "[1]", "[0,4]", 4), "known dtype, got 'F31'"},
      {"LowerCaseDtype", one("f32", "[1]", "[0,4]", 4), "known dtype"},
      {"EmptyDtype", one("", "[1]", "[0,4]", 4), "known dtype"},
      {"DtypeIsANumber", body(R"({"dtype":32,"shape":[1],"data_offsets":[0,4]})"), "a string"},
      {"WiderDtype", one("F64", "[1]", "[0,4]", 4), "expected 8 bytes for F64 [1], got 4"},
      {"NarrowerDtype", one("F16", "[1]", "[0,4]", 4), "expected 2 bytes for F16 [1], got 4"},
      {"SeventeenDimensions", one("U8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]", 1),
       "w: expected at most 16 dimensions, got more"},
      {"NegativeDimension", one("F32", "[-1]", "[0,4]", 4), "dimensions >= 0"},
      {"TwoNegativeDimensions", one("F32", "[-1,-1]", "[0,4]", 4), "dimensions >= 0"},
      {"FractionalDimension", one("F32", "[1.0]", "[0,4]", 4), "an integer of 64 bits"},
      {"ExponentDimension", one("F32", "[1e0]", "[0,4]", 4), "an integer of 64 bits"},
      {"NanDimension", one("F32", "[NaN]", "[0,4]", 4), "got 'N'"},
      {"StringDimension", one("F32", "[\"1\"]", "[0,4]", 4), "got '\"'"},
      {"ShapeIsANumber", one("F32", "1", "[0,4]", 4), "an array"},
      {"NestedShape", one("F32", "[[1]]", "[0,4]", 4), "got '['"},
      {"DimensionBeyond64Bits", one("F32", "[18446744073709551617]", "[0,4]", 4), "64 bits"},
      {"ShapeOverflow", one("F32", "[" + huge + "," + huge + "]", "[0,4]", 4), "below 2^63 bytes"},
      {"ShapeOverflowToTheRightSize", one("F32", "[4611686018427387905,4]", "[0,16]", 16),
       "below 2^63 bytes"},
      {"ShapeOverflowBehindAZero", one("F32", "[0," + huge + ",4]", "[0,0]", 0), "below 2^63"},
      {"ItemSizeOverflow", one("F64", "[2305843009213693952]", "[0,4]", 4), "below 2^63 bytes"},
      {"NegativeOffset", one("F32", "[1]", "[-4,0]", 4), "unsigned integer"},
      {"OffsetsReversed", one("F32", "[1]", "[4,0]", 4), "within the 4 bytes"},
      {"EndOutsideTheFile", one("F32", "[2]", "[0,8]", 4), "within the 4 bytes"},
      {"BothOutsideTheFile", one("F32", "[1]", "[1000,1004]", 4), "within the 4 bytes"},
      {"EndOfAllOnes", one("U8", "[4]", "[0,18446744073709551615]", 4), "within the 4 bytes"},
      {"OffsetBeyond64Bits", one("U8", "[4]", "[0,18446744073709551616]", 4), "64 bits"},
      {"Overlap", two("[0,4]", "[2,6]", 6), "overlaps the tensor before"},
      {"SameBytesTwice", two("[0,4]", "[0,4]", 4), "overlaps the tensor before"},
      {"Hole", two("[0,4]", "[5,9]", 9), "there is a hole"},
      {"HoleAtTheStart", one("F32", "[1]", "[4,8]", 8), "there is a hole"},
      {"HoleAtTheEnd", two("[0,4]", "[4,8]", 9), "expected 8 bytes of data, got 9"},
      {"EmptyTensorInsideAnother",
       safetensors_bytes(
           "{" + entry("a", "U8", "[4]", "[0,4]") + "," + entry("b", "U8", "[0]", "[2,2]") + "}",
           4),
       "overlaps"},
      {"SameNameTwice",
       safetensors_bytes(
           "{" + entry("w", "U8", "[4]", "[0,4]") + "," + entry("w", "U8", "[4]", "[4,8]") + "}",
           8),
       "w: expected every tensor once"},
      {"SameNameEscaped",
       safetensors_bytes("{" + entry("w", "U8", "[4]", "[0,4]") + "," +
                             entry("\\u0077", "U8", "[4]", "[4,8]") + "}",
                         8),
       "w: expected every tensor once"},
      {"EmptyName", safetensors_bytes("{" + entry("", "U8", "[4]", "[0,4]") + "}", 4), "a name"},
      {"DataWithoutTensors", safetensors_bytes("{}", 4), "expected 0 bytes of data, got 4"},
      {"MetadataIsAnArray", safetensors_bytes(R"({"__metadata__":[]})", 0), "an object"},
      {"MetadataValueIsANumber", safetensors_bytes(R"({"__metadata__":{"a":1}})", 0), "a string"},
      {"MetadataTwice", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})", 0),
       "__metadata__ once"},
      {"MetadataKeyTwice", safetensors_bytes(R"({"__metadata__":{"a":"","a":""}})", 0),
       "'a' again"},
      {"NestingBomb", safetensors_bytes("{\"w\":" + std::string(1'000'000, '['), 0), "an object"},
      {"ShapeBomb", one("U8", "[" + std::string(200'000, '1') + "]", "[0,1]", 1), "64 bits"},
      {"TrailingComma", safetensors_bytes("{" + entry("w", "U8", "[4]", "[0,4]") + ",}", 4),
       "a string"},
  };
}

class HostileFile : public testing::TestWithParam<Hostile> {};

TEST_P(HostileFile, IsRefusedWithAnErrorThatNamesFileAndFault) {
  const TemporaryDirectory directory;
  const auto path = directory.write("hostile.safetensors", GetParam().bytes);
  const std::string error = error_of([&] { SafetensorsFile::open(path); });
  EXPECT_NE(error.find(path.string()), std::string::npos) << error;
  EXPECT_NE(error.find(GetParam().error), std::string::npos) << error;
}

INSTANTIATE_TEST_SUITE_P(All, HostileFile, testing::ValuesIn(hostile_files()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moq::checkpoint
