#include "inference/checkpoint/json.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::checkpoint {
namespace {

Json parse(std::string_view text) {
  return Json::parse(text, "test.json");
}

TEST(Json, ReadsEveryKindOfValue) {
  const Json value = parse(R"( {"a": [1, -2.5, 1e3, true, false, null, "x"], "b": {}} )");
  const Json::Array& a = value.at("a", "test").as_array("a");
  EXPECT_EQ(a[0].as_integer("a"), 1);
  EXPECT_EQ(a[1].as_number("a"), -2.5);
  EXPECT_EQ(a[2].as_number("a"), 1000.0);
  EXPECT_TRUE(a[3].as_boolean("a"));
  EXPECT_FALSE(a[4].as_boolean("a"));
  EXPECT_TRUE(a[5].is_null());
  EXPECT_EQ(a[6].as_string("a"), "x");
  EXPECT_TRUE(value.at("b", "test").as_object("b").empty());
}

TEST(Json, KeepsMembersInFileOrder) {
  const Json value = parse(R"({"z": 1, "a": 2, "m": 3})");
  std::string keys;
  for (const auto& [key, member] : value.as_object("test")) {
    keys += key;
  }
  EXPECT_EQ(keys, "zam");
}

TEST(Json, UnescapesStringsIntoUtf8) {
  EXPECT_EQ(parse(R"("\u00e9\u20ac\ud83d\ude00\n\"\\\/")").as_string("s"), "é€😀\n\"\\/");
}

TEST(Json, TellsIntegersFromNumbers) {
  EXPECT_TRUE(parse("1").is_integer());
  EXPECT_FALSE(parse("1.0").is_integer());
  EXPECT_FALSE(parse("1e0").is_integer());
  EXPECT_EQ(parse("-9223372036854775808").as_integer("n"),
            std::numeric_limits<std::int64_t>::min());
}

TEST(Json, DumpReadsBackToTheSameText) {
  const std::string text =
      R"({"a": [1, 2.5, true, null, "q\"\\\u0001é"], "empty": {}, "list": [], "n": 1.0})";
  EXPECT_EQ(parse(text).dump(), text);
  EXPECT_EQ(parse(parse(text).dump(2)).dump(), text);
}

TEST(Json, IndentsOnRequest) {
  EXPECT_EQ(parse(R"({"a":[1,2]})").dump(2), "{\n  \"a\": [\n    1,\n    2\n  ]\n}");
}

TEST(Json, NamesSourceLineAndColumnInErrors) {
  EXPECT_EQ(error_of([] { parse("{\n  \"a\": x\n}"); }),
            "test.json: line 2, column 8: expected a value, got 'x'");
}

TEST(Json, NamesTheTypeItExpectedAndFound) {
  EXPECT_EQ(error_of([] { parse("\"8\"").as_integer("config.json: num_bits"); }),
            "config.json: num_bits: expected an integer, got a string");
  EXPECT_EQ(error_of([] { parse("{}").at("hidden_size", "config.json"); }),
            "config.json: expected the key 'hidden_size', which is missing");
}

TEST(Json, ReadsNestingUpToTheLimitAndNoDeeper) {
  const auto nested = [](int depth) {
    return std::string(static_cast<std::size_t>(depth), '[') +
           std::string(static_cast<std::size_t>(depth), ']');
  };
  EXPECT_NO_THROW(parse(nested(kMaxJsonDepth)));
  EXPECT_THROW(parse(nested(kMaxJsonDepth + 1)), Error);
  EXPECT_THROW(parse(std::string(1'000'000, '[')), Error);
}

/// Texts that strict JSON refuses, some of which lenient readers accept.
class RefusedJson : public testing::TestWithParam<const char*> {};

TEST_P(RefusedJson, Throws) {
  EXPECT_THROW(parse(GetParam()), Error) << GetParam();
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedJson,
    testing::Values("", " ", "{", "[", "[1", "[1,]", "[,1]", "{\"a\":1,}", "{\"a\" 1}", "{a:1}",
                    "{'a':1}", "{1:1}", "{\"a\":1 \"b\":2}", "{\"a\":1}{", "1 2", "]", "nul", "tru",
                    "NaN", "-NaN", "Infinity", "-Infinity", "+1", "01", "-", "1.", ".5", "1e",
                    "1e+", "0x10", "1e999", "9223372036854775808", "-9223372036854775809", "\"",
                    "\"\\\"", "\"\\x41\"", "\"\\u12\"", "\"\\u12g4\"", "\"\\ud800\"", "\"\\udc00\"",
                    "\"\\ud800\\u0041\"", "\"\n\"", "\"\x01\"", "\"\xff\"", "\"\xc0\x80\"",
                    "\"\xed\xa0\x80\"", "\"\xf5\x80\x80\x80\"", "\"\xe2\x82\"", "\xef\xbb\xbf{}",
                    "// c\n1", "/* c */1", "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}"));

TEST(Json, RefusesAnEmbeddedZeroByte) {
  EXPECT_THROW(parse(std::string_view("1\0", 2)), Error);
  EXPECT_THROW(parse(std::string_view("\"\\\0\"", 4)), Error);
}

TEST(Json, RefusesToWriteWhatJsonCannotHold) {
  EXPECT_THROW(Json(std::numeric_limits<double>::infinity()).dump(), Error);
}

TEST(JsonReader, ReadsUnsignedUpToTheirLimit) {
  JsonReader reader("18446744073709551615", "test");
  EXPECT_EQ(reader.read_unsigned(), std::numeric_limits<std::uint64_t>::max());
  JsonReader negative("-1", "test");
  EXPECT_THROW(negative.read_unsigned(), Error);
}

}  // namespace
}  // namespace moq::checkpoint
