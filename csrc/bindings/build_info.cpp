#include <torch/version.h>

#include "csrc/bindings/bindings.h"
#include "kernels/common/check.h"
#include "kernels/cpu/isa.h"

namespace moq::bindings {

void bind_build_info(pybind11::module_& m) {
  namespace py = pybind11;
  // pybind11 turns moq::Error (a std::runtime_error) into RuntimeError by itself; a type of our own
  // lets callers tell a refused input from any other failure.
  py::register_exception<moq::Error>(m, "Error", PyExc_RuntimeError);

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
#if defined(MOQ_WITH_CUDA)
        info["cuda_architectures"] = MOQ_CUDA_ARCHITECTURES;
#else
        info["cuda_architectures"] = py::none();
#endif
        info["cpu_isa"] = kernels::cpu::name_of(kernels::cpu::active_isa());
        return info;
      },
      "What this extension was built for: torch version, compiler, CUDA architectures (None: CPU "
      "only), and the "
      "instruction set that its CPU kernels run with here.");
}

}  // namespace moq::bindings
