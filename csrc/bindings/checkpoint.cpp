#include <torch/csrc/utils/pybind.h>

#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "csrc/bindings/bindings.h"
#include "inference/checkpoint/checkpoint.h"
#include "inference/checkpoint/exchange.h"
#include "inference/checkpoint/safetensors_writer.h"
#include "kernels/common/check.h"

namespace moq::bindings {
namespace {

namespace py = pybind11;
using checkpoint::Checkpoint;
using checkpoint::SafetensorsWriter;
using checkpoint::TensorInfo;

constexpr std::array<std::pair<const char*, at::ScalarType>, 12> kDtypes = {{
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"F64", at::kDouble},
    {"I8", at::kChar},
    {"U8", at::kByte},
    {"I16", at::kShort},
    {"I32", at::kInt},
    {"I64", at::kLong},
    {"BOOL", at::kBool},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
}};

std::string dtype_name(at::ScalarType dtype) {
  const auto* const entry = std::find_if(kDtypes.begin(), kDtypes.end(),
                                         [&](const auto& pair) { return pair.second == dtype; });
  MOQ_CHECK(entry != kDtypes.end(), "safetensors: expected a dtype that files can hold, got ",
            c10::toString(dtype));
  return entry->first;
}

at::ScalarType scalar_type(const TensorInfo& tensor) {
  const auto* const entry = std::find_if(
      kDtypes.begin(), kDtypes.end(), [&](const auto& pair) { return pair.first == tensor.dtype; });
  MOQ_CHECK(entry != kDtypes.end(), tensor.name, ": expected a dtype that torch has, got ",
            tensor.dtype);
  return entry->second;
}

at::Tensor copy_tensor(const TensorInfo& info, std::span<const std::byte> bytes) {
  at::Tensor tensor = at::empty(info.shape, scalar_type(info));
  std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

std::map<std::string, at::Tensor> read_safetensors(const std::string& path) {
  const auto file = checkpoint::SafetensorsFile::open(path);
  std::map<std::string, at::Tensor> tensors;
  for (const TensorInfo& info : file.tensors()) {
    tensors.emplace(info.name, copy_tensor(info, file.bytes(info)));
  }
  return tensors;
}

/// name, dtype and shape of each tensor of a file to be written, in the order given.
std::vector<TensorInfo> describe(const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& [name, tensor] : tensors) {
    infos.push_back(
        {.name = name, .dtype = dtype_name(tensor.scalar_type()), .shape = tensor.sizes().vec()});
  }
  return infos;
}

void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer(path, describe(tensors), metadata);
  std::map<std::string_view, const at::Tensor*> by_name;
  for (const auto& [name, tensor] : tensors) {
    by_name.emplace(name, &tensor);
  }
  for (const TensorInfo& info : writer.tensors()) {
    const at::Tensor contiguous = by_name.at(info.name)->cpu().contiguous();
    writer.write({static_cast<const std::byte*>(contiguous.const_data_ptr()),
                  static_cast<std::size_t>(contiguous.nbytes())});
  }
  writer.finish();
}

}  // namespace

void bind_checkpoint(py::module_& m) {
  py::class_<TensorInfo>(m, "TensorInfo", "One tensor of a checkpoint.")
      .def_readonly("name", &TensorInfo::name)
      .def_readonly("dtype", &TensorInfo::dtype, "as safetensors names it: 'F32', 'I8', …")
      .def_readonly("shape", &TensorInfo::shape)
      .def_property_readonly("size_bytes", &TensorInfo::size_bytes);

  py::class_<Checkpoint>(
      m, "Checkpoint",
      "The tensors of a checkpoint directory, mapped. Opening checks every header "
      "and the index; nothing in the files is trusted.")
      .def(py::init([](const std::string& directory) { return Checkpoint::open(directory); }),
           py::arg("directory"), py::call_guard<py::gil_scoped_release>())
      .def("names", &Checkpoint::names, "Every tensor's name, sorted.")
      .def("__contains__",
           [](const Checkpoint& self, const std::string& name) { return self.contains(name); })
      .def(
          "info", [](const Checkpoint& self, const std::string& name) { return self.at(name); },
          py::arg("name"),
          "dtype, shape and size of a tensor. Raises moq._C.Error if it is missing.")
      .def(
          "read",
          [](const Checkpoint& self, const std::string& name) {
            return copy_tensor(self.at(name), self.bytes(name));
          },
          py::arg("name"), py::call_guard<py::gil_scoped_release>(),
          "A copy of the tensor, on the CPU.")
      .def(
          "files",
          [](const Checkpoint& self) {
            std::vector<std::string> names;
            for (const auto& file : self.files()) {
              names.push_back(file.path().filename().string());
            }
            return names;
          },
          "Names of the safetensors files.");

  m.def("read_safetensors", &read_safetensors, py::arg("path"),
        py::call_guard<py::gil_scoped_release>(),
        "Copies of the tensors of one safetensors file, by name.");
  m.def("write_safetensors", &write_safetensors, py::arg("path"), py::arg("tensors"),
        py::arg("metadata"), py::call_guard<py::gil_scoped_release>(),
        "Writes (name, tensor) pairs as one safetensors file and flushes it to the disk.");
  m.def(
      "exchange_paths",
      [](const std::string& first, const std::string& second) {
        return checkpoint::exchange_paths(first, second);
      },
      py::arg("first"), py::arg("second"), py::call_guard<py::gil_scoped_release>(),
      "Exchanges two directories in one step. False, with nothing changed, where the file system "
      "has no such operation.");
}

}  // namespace moq::bindings
