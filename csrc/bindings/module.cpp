// The Python module moq._C: a list. Each class has its own file beside this one; operators are
// registered by csrc/library.cpp when this library is loaded.
#include <torch/csrc/utils/pybind.h>

#include "csrc/bindings/bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ classes of moq; the operators are under torch.ops.moq.";
  moq::bindings::bind_build_info(m);
  moq::bindings::bind_engine(m);
  moq::bindings::bind_hessian(m);
  moq::bindings::bind_parallel(m);
  moq::bindings::bind_checkpoint(m);
  moq::bindings::bind_export(m);
  moq::bindings::bind_schedule(m);
  moq::bindings::bind_spectrum(m);
  moq::bindings::bind_trainer(m);
}
