#include "inference/checkpoint/checkpoint.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "csrc/export/tensor_file.h"
#include "inference/checkpoint/exchange.h"

namespace moq::bindings {

namespace py = pybind11;
using checkpoint::Checkpoint;
using checkpoint::TensorInfo;

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
      .def(py::init(&Checkpoint::open), py::arg("directory"),
           py::call_guard<py::gil_scoped_release>())
      .def("names", &Checkpoint::names, "Every tensor's name, sorted.")
      .def("__contains__",
           [](const Checkpoint& self, const std::string& name) { return self.contains(name); })
      .def(
          "info", [](const Checkpoint& self, const std::string& name) { return self.at(name); },
          py::arg("name"), "dtype, shape and size of a tensor. Raises moq.Error if it is missing.")
      .def(
          "read",
          [](const Checkpoint& self, const std::string& name) {
            return exporter::copy_tensor(self.at(name), self.bytes(name));
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

  m.def("read_safetensors", &exporter::read_safetensors, py::arg("path"),
        py::call_guard<py::gil_scoped_release>(),
        "Copies of the tensors of one safetensors file, by name.");
  m.def("write_safetensors", &exporter::write_safetensors, py::arg("path"), py::arg("tensors"),
        py::arg("metadata"), py::call_guard<py::gil_scoped_release>(),
        "Writes (name, tensor) pairs as one safetensors file and flushes it to the disk.");
  m.def("exchange_paths", &checkpoint::exchange_paths, py::arg("first"), py::arg("second"),
        py::call_guard<py::gil_scoped_release>(),
        "Exchanges two directories in one step. False, with nothing changed, where the file system "
        "has no such operation.");
}

}  // namespace moq::bindings
