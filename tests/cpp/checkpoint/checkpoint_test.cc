#include "inference/checkpoint/checkpoint.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::checkpoint {
namespace {

/// A file that holds one U8 tensor of four bytes.
std::string shard(const std::string& tensor) {
  return safetensors_bytes("{\"" + tensor + R"(":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
                           4);
}

std::string index(const std::string& weight_map) {
  return "{\"weight_map\":" + weight_map + "}";
}

constexpr const char* kIndexName = "model.safetensors.index.json";

/// Two shards, and the index given.
std::string error_with_index(const std::string& index_text) {
  const TemporaryDirectory directory;
  directory.write("a.safetensors", shard("a"));
  directory.write("b.safetensors", shard("b"));
  directory.write(kIndexName, index_text);
  return error_of([&] { Checkpoint::open(directory.path()); });
}

TEST(Checkpoint, OpensASingleFile) {
  const TemporaryDirectory directory;
  directory.write("model.safetensors", shard("a"));
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  EXPECT_EQ(checkpoint.names(), std::vector<std::string>{"a"});
  EXPECT_EQ(checkpoint.at("a").dtype, "U8");
  EXPECT_EQ(checkpoint.bytes("a")[3], std::byte{3});
}

TEST(Checkpoint, FindsTensorsAcrossShards) {
  const TemporaryDirectory directory;
  directory.write("a.safetensors", shard("a"));
  directory.write("b.safetensors", shard("b"));
  directory.write(kIndexName, R"({"metadata":{"total_size":8,"notes":[null,true,-1.5,{"a":"b"}]},)"
                              R"("weight_map":{"a":"a.safetensors","b":"b.safetensors"}})");
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(checkpoint.bytes("b").size(), 4U);
  EXPECT_EQ(checkpoint.find("c"), nullptr);
  EXPECT_NE(error_of([&] { checkpoint.at("c"); }).find("'c', which is missing"), std::string::npos);
}

TEST(Checkpoint, StaysValidWhenMoved) {
  const TemporaryDirectory directory;
  directory.write("model.safetensors", shard("a"));
  Checkpoint first = Checkpoint::open(directory.path());
  const Checkpoint second = std::move(first);
  EXPECT_EQ(second.bytes("a")[1], std::byte{1});
}

TEST(Checkpoint, RefusesADirectoryWithoutWeights) {
  const TemporaryDirectory directory;
  EXPECT_NE(error_of([&] { Checkpoint::open(directory.path()); }).find("got neither"),
            std::string::npos);
  EXPECT_NE(error_of([&] { Checkpoint::open(directory.path() / "none"); }).find("got nothing"),
            std::string::npos);
}

TEST(Checkpoint, RefusesBothFormsAtOnce) {
  const TemporaryDirectory directory;
  directory.write("model.safetensors", shard("a"));
  directory.write(kIndexName, index(R"({"a":"model.safetensors"})"));
  EXPECT_NE(error_of([&] { Checkpoint::open(directory.path()); }).find("got both"),
            std::string::npos);
}

TEST(Checkpoint, RefusesTheSameKeyInTwoFiles) {
  const TemporaryDirectory directory;
  directory.write("a.safetensors", shard("a"));
  directory.write("b.safetensors",
                  safetensors_bytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                    R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                                    4));
  directory.write(kIndexName, index(R"({"a":"a.safetensors","b":"b.safetensors"})"));
  EXPECT_NE(error_of([&] { Checkpoint::open(directory.path()); }).find("in one file"),
            std::string::npos);
}

/// An index that must be refused, and words that its error must contain.
struct HostileIndex {
  const char* name;
  std::string text;
  const char* error;
};

void PrintTo(const HostileIndex& hostile, std::ostream* out) {
  *out << hostile.name;
}

class HostileIndexFile : public testing::TestWithParam<HostileIndex> {};

TEST_P(HostileIndexFile, IsRefused) {
  const std::string error = error_with_index(GetParam().text);
  EXPECT_NE(error.find(GetParam().error), std::string::npos) << error;
}

INSTANTIATE_TEST_SUITE_P(
    All, HostileIndexFile,
    testing::Values(
        HostileIndex{"NotJson", "weight_map", "expected an object, got 'w'"},
        HostileIndex{"Empty", "", "the end of the text"},
        HostileIndex{"NoWeightMap", "{}", "'weight_map'"},
        HostileIndex{"WeightMapIsAnArray", index("[]"), "an object"},
        HostileIndex{"ShardIsANumber", index(R"({"a":1})"), "a string"},
        HostileIndex{"KeyTwice", index(R"({"a":"a.safetensors","a":"b.safetensors"})"), "repeated"},
        HostileIndex{"ParentDirectory", index(R"({"a":"../a.safetensors"})"), "plain name"},
        HostileIndex{"AbsolutePath", index(R"({"a":"/etc/a.safetensors"})"), "plain name"},
        HostileIndex{"SubDirectory", index(R"({"a":"x/a.safetensors"})"), "plain name"},
        HostileIndex{"BackSlash", index(R"({"a":"..\\a.safetensors"})"), "plain name"},
        HostileIndex{"ZeroByte", index(R"({"a":"a.safetensors\u0000.safetensors"})"), "plain name"},
        HostileIndex{"EmptyShardName", index(R"({"a":""})"), "plain name"},
        HostileIndex{"OtherFileType", index(R"({"a":"a.bin"})"), "plain name"},
        HostileIndex{"MissingShard", index(R"({"a":"c.safetensors"})"), "no such file"},
        HostileIndex{"ShardNameTooLongForAFile",
                     index("{\"a\":\"" + std::string(300, 'x') + ".safetensors\"}"),
                     "expected the shard 'xxx"},
        HostileIndex{"WeightMapTwice",
                     R"({"weight_map":{"a":"a.safetensors"},"weight_map":{"b":"b.safetensors"}})",
                     "'weight_map' is repeated"},
        HostileIndex{"MetadataIsNoJson", R"({"metadata":{"total_size":8,},"weight_map":{}})",
                     "a string"},
        HostileIndex{"KeyInTheWrongFile", index(R"({"a":"b.safetensors","b":"a.safetensors"})"),
                     "expected in"},
        HostileIndex{"KeyInNoFile",
                     index(R"({"a":"a.safetensors","b":"b.safetensors","c":"a.safetensors"})"),
                     "got it in no file"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Checkpoint, RefusesATensorThatTheIndexDoesNotList) {
  const TemporaryDirectory directory;
  directory.write("b.safetensors",
                  safetensors_bytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                    R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                                    4));
  directory.write(kIndexName, index(R"({"b":"b.safetensors"})"));
  EXPECT_NE(error_of([&] { Checkpoint::open(directory.path()); }).find("a: expected every tensor"),
            std::string::npos);
}

}  // namespace
}  // namespace moq::checkpoint
