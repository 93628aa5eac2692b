#include "csrc/export/tensor_file.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "inference/checkpoint/safetensors_writer.h"
#include "kernels/common/check.h"

namespace moq::exporter {
namespace {

using checkpoint::TensorInfo;

struct NamedDtype {
  std::string_view name;
  at::ScalarType dtype;
};

constexpr std::array kDtypes = {
    NamedDtype{"F32", at::kFloat},
    NamedDtype{"F16", at::kHalf},
    NamedDtype{"BF16", at::kBFloat16},
    NamedDtype{"F64", at::kDouble},
    NamedDtype{"I8", at::kChar},
    NamedDtype{"U8", at::kByte},
    NamedDtype{"I16", at::kShort},
    NamedDtype{"I32", at::kInt},
    NamedDtype{"I64", at::kLong},
    NamedDtype{"BOOL", at::kBool},
    NamedDtype{"F8_E4M3", at::kFloat8_e4m3fn},
    NamedDtype{"F8_E5M2", at::kFloat8_e5m2},
};

TensorInfo describe(const std::string& name, const at::Tensor& tensor) {
  const auto* const entry = std::ranges::find(kDtypes, tensor.scalar_type(), &NamedDtype::dtype);
  MOQ_CHECK(entry != kDtypes.end(), name,
            ": expected a dtype that safetensors files can hold, got ",
            c10::toString(tensor.scalar_type()));
  return {.name = name, .dtype = std::string(entry->name), .shape = tensor.sizes().vec()};
}

}  // namespace

at::Tensor copy_tensor(const TensorInfo& info, std::span<const std::byte> bytes) {
  const auto* const entry =
      std::ranges::find(kDtypes, std::string_view(info.dtype), &NamedDtype::name);
  MOQ_CHECK(entry != kDtypes.end(), info.name, ": expected a dtype that torch has, got ",
            info.dtype);
  at::Tensor tensor = at::empty(info.shape, entry->dtype);
  std::ranges::copy(bytes, static_cast<std::byte*>(tensor.mutable_data_ptr()));
  return tensor;
}

std::map<std::string, at::Tensor> read_safetensors(const std::filesystem::path& path) {
  const auto file = checkpoint::SafetensorsFile::open(path);
  std::map<std::string, at::Tensor> tensors;
  for (const TensorInfo& info : file.tensors()) {
    tensors.emplace(info.name, copy_tensor(info, file.bytes(info)));
  }
  return tensors;
}

void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorInfo> infos;
  std::map<std::string_view, const at::Tensor*> by_name;
  for (const auto& [name, tensor] : tensors) {
    infos.push_back(describe(name, tensor));
    by_name.emplace(name, &tensor);
  }
  checkpoint::SafetensorsWriter writer(path, infos, metadata);
  for (const TensorInfo& info : writer.tensors()) {  // in the order of the file
    const at::Tensor contiguous = by_name.at(info.name)->cpu().contiguous();
    writer.write({static_cast<const std::byte*>(contiguous.const_data_ptr()),
                  static_cast<std::size_t>(contiguous.nbytes())});
  }
  writer.finish();
}

}  // namespace moq::exporter
