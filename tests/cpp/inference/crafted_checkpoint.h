#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "inference/checkpoint/checkpoint.h"
#include "inference/checkpoint/safetensors_writer.h"
#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::inference {

/// A checkpoint of a test's own tensors, sound as a file whatever they say.
class CraftedCheckpoint {
 public:
  template <typename T>
  void set(const std::string& name, const std::string& dtype,
           const std::vector<std::int64_t>& shape, const std::vector<T>& values) {
    std::vector<std::byte> bytes(values.size() * sizeof(T));
    if (!values.empty()) {
      std::memcpy(bytes.data(), values.data(), bytes.size());
    }
    tensors_[name] = {{.name = name, .dtype = dtype, .shape = shape}, std::move(bytes)};
  }
  /// Float32 values 1, 2, 3, … / 8.
  void set_floats(const std::string& name, const std::vector<std::int64_t>& shape) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) {
      count *= size;
    }
    std::vector<float> values;
    for (std::int64_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(i + 1) / 8.0F);
    }
    set(name, "F32", shape, values);
  }
  void erase(const std::string& name) { tensors_.erase(name); }

  checkpoint::Checkpoint open() const {
    std::vector<checkpoint::TensorInfo> infos;
    for (const auto& [name, tensor] : tensors_) {
      infos.push_back(tensor.info);
    }
    checkpoint::SafetensorsWriter writer(directory_.path() / "model.safetensors", infos, {});
    for (const checkpoint::TensorInfo& info : writer.tensors()) {
      writer.write(tensors_.at(info.name).bytes);
    }
    writer.finish();
    return checkpoint::Checkpoint::open(directory_.path());
  }

 private:
  struct Tensor {
    checkpoint::TensorInfo info;
    std::vector<std::byte> bytes;
  };

  std::map<std::string, Tensor> tensors_;
  checkpoint::TemporaryDirectory directory_;
};

}  // namespace moq::inference
