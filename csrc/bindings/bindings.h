#pragma once

#include <pybind11/pybind11.h>

/// One function per bound class or group, each in its own file, called from module.cpp.
namespace moq::bindings {

void bind_build_info(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_hessian(pybind11::module_& m);
void bind_parallel(pybind11::module_& m);
void bind_checkpoint(pybind11::module_& m);
void bind_export(pybind11::module_& m);
void bind_schedule(pybind11::module_& m);
void bind_spectrum(pybind11::module_& m);
void bind_trainer(pybind11::module_& m);

}  // namespace moq::bindings
