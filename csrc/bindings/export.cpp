#include <torch/csrc/utils/pybind.h>

#include "csrc/bindings/bindings.h"
#include "csrc/export/codes.h"
#include "csrc/grid_names.h"

namespace moq::bindings {

namespace py = pybind11;

void bind_export(py::module_& m) {
  m.def(
      "recover_codes",
      [](const std::string& name, const at::Tensor& master, const at::Tensor& simulated,
         int num_bits, const std::string& mode, const std::string& granularity,
         std::int64_t group_size, bool transposed, at::ScalarType scale_dtype,
         const std::string& scale_rule, const std::optional<at::Tensor>& absmax) {
        const exporter::GridSpec spec{
            .num_bits = num_bits,
            .mode = parse_mode("recover_codes", mode),
            .granularity = parse_granularity("recover_codes", granularity),
            .group_size = group_size,
            .transposed = transposed,
            .scale_dtype = scale_dtype,
            .scale_rule = parse_scale_rule("recover_codes", scale_rule)};
        exporter::StoredCodes stored;
        {
          const py::gil_scoped_release release;
          stored =
              exporter::recover_codes(name, master, simulated, spec, absmax.value_or(at::Tensor()));
        }
        py::object zero_points = py::none();
        if (stored.zero_points.defined()) {
          zero_points = py::cast(stored.zero_points);
        }
        return py::make_tuple(stored.codes, stored.scales, zero_points, stored.quantization_error);
      },
      py::arg("name"), py::arg("master"), py::arg("simulated"), py::kw_only(), py::arg("num_bits"),
      py::arg("mode"), py::arg("granularity"), py::arg("group_size"), py::arg("transposed"),
      py::arg("scale_dtype"), py::arg("scale_rule") = "absmax", py::arg("absmax") = py::none(),
      "Codes int8 [out, in], scales [out, groups], zero points int8 [out, groups] (None: "
      "symmetric) "
      "and relative quantization error of a trained weight. Raises moq.Error naming the "
      "parameter unless the stored numbers are the simulated ones bit for bit.");
  m.def("pack_codes", &exporter::pack_codes, py::arg("codes"), py::arg("num_bits"),
        py::call_guard<py::gil_scoped_release>(),
        "Packs int8 codes [rows, columns] into int32 words [rows, ceil(columns * num_bits / 32)].");
  m.def("unpack_codes", &exporter::unpack_codes, py::arg("words"), py::arg("num_bits"),
        py::arg("columns"), py::call_guard<py::gil_scoped_release>(),
        "The int8 codes [rows, columns] of packed int32 words.");
}

}  // namespace moq::bindings
