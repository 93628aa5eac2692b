#include "csrc/trainer/trainer.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "csrc/grid_names.h"
#include "csrc/trainer/gather.h"
#include "kernels/common/name_hash.h"

namespace moq::bindings {

void bind_trainer(pybind11::module_& m) {
  namespace py = pybind11;
  using trainer::TrainedParameter;
  using trainer::Trainer;

  py::class_<TrainedParameter>(
      m, "TrainedParameter",
      "A weight matrix with a master and a simulated value (csrc/trainer/trainer.h).")
      .def(py::init([](std::string name, at::Tensor parameter, at::Tensor master,
                       at::Tensor simulated, at::Tensor full_precision, std::int64_t block,
                       const std::string& granularity, const std::string& mode,
                       const std::string& rounding, std::int64_t group_size, bool transposed,
                       std::int64_t blend_steps, std::int64_t first_element,
                       std::int64_t unsharded_cols, const std::string& scale_rule,
                       const std::optional<at::Tensor>& collected) {
             return TrainedParameter{
                 .name = std::move(name),
                 .parameter = std::move(parameter),
                 .master = std::move(master),
                 .simulated = std::move(simulated),
                 .full_precision = std::move(full_precision),
                 .block = block,
                 .granularity = parse_granularity("TrainedParameter", granularity),
                 .mode = parse_mode("TrainedParameter", mode),
                 .rounding = parse_rounding("TrainedParameter", rounding),
                 .scale_rule = parse_scale_rule("TrainedParameter", scale_rule),
                 .group_size = group_size,
                 .transposed = transposed,
                 .blend_steps = blend_steps,
                 .collected = collected.value_or(at::Tensor()),
                 .first_element = first_element,
                 .unsharded_cols = unsharded_cols};
           }),
           py::kw_only(), py::arg("name"), py::arg("parameter"), py::arg("master"),
           py::arg("simulated"), py::arg("full_precision"), py::arg("block"),
           py::arg("granularity"), py::arg("mode"), py::arg("rounding"), py::arg("group_size"),
           py::arg("transposed"), py::arg("blend_steps"), py::arg("first_element"),
           py::arg("unsharded_cols"), py::arg("scale_rule") = "absmax",
           py::arg("collected") = py::none());

  m.def(
      "all_gather_bytes",
      [](const std::string& process_group_name, const std::string& own) {
        std::vector<std::string> gathered;
        {
          const py::gil_scoped_release release;
          gathered = trainer::all_gather_bytes(process_group_name, own);
        }
        return std::vector<py::bytes>(gathered.begin(), gathered.end());
      },
      py::arg("process_group_name"), py::arg("own"),
      "The bytes of all ranks of a process group that carries CPU tensors, in order of rank.");
  m.attr("COLLECTION_WORDS") = trainer::kCollectionWords;
  m.def("name_hash", &name_hash, py::arg("name"),
        "What a parameter's name is in the key of its random stream: 32 bits.");

  py::class_<Trainer>(m, "Trainer",
                      "Keeps simulated weights in step with their masters: begin_step, the inner "
                      "optimizer's step, end_step.")
      .def(py::init<std::vector<TrainedParameter>, schedule::Schedule, std::uint64_t, std::int64_t,
                    bool>(),
           py::arg("parameters"), py::arg("schedule"), py::arg("seed"), py::arg("step") = 0,
           py::arg("in_place") = true)
      .def("set_reduction", &Trainer::set_reduction, py::arg("reduce"),
           "Sets what brings together over the ranks what `collected` holds after each stage.")
      // Gradients may be tensor subclasses, whose operators run in Python: the GIL stays held.
      .def("begin_step", &Trainer::begin_step, py::arg("cast") = true,
           "Gives each master the gradient of its parameter, in the master's dtype or as it is.")
      .def("end_step", &Trainer::end_step, py::arg("found_inf") = py::none(),
           py::call_guard<py::gil_scoped_release>(),
           "Advances the schedule and writes the simulated values, unless found_inf is non-zero.")
      .def("abandon_step", &Trainer::abandon_step, "Drops the masters' gradients.")
      .def("write_simulated", &Trainer::write_simulated, py::call_guard<py::gil_scoped_release>(),
           "Writes the simulated values of the current step.")
      .def("write_masters", &Trainer::write_masters, py::call_guard<py::gil_scoped_release>(),
           "Writes the masters where the simulated values are.")
      .def("check_layouts", &Trainer::check_layouts,
           "Makes sure that the parameters' memory is laid out as it was.")
      .def("touched", &Trainer::touched,
           "True if somebody else has written to a simulated value, be it the same.")
      .def("overwritten", &Trainer::overwritten, py::call_guard<py::gil_scoped_release>(),
           "Numbers of the parameters whose simulated value somebody else has changed.")
      .def("grid_width", &Trainer::grid_width, py::arg("parameter"),
           "Width of the grid on which a parameter lies exactly now, or None.")
      .def("adopt", &Trainer::adopt, py::arg("changed"),
           "Makes what is in these parameters now their masters; the others are unchanged.")
      .def("rebind", &Trainer::rebind, py::arg("simulated"), py::arg("full_precision"),
           "Points at the memory that holds the values now.")
      .def("set_sensitivities", &Trainer::set_sensitivities, py::arg("sensitivities"),
           "Re-plans what lies after the current step; one number in [0, 1] per block.")
      .def("restore", &Trainer::restore, py::arg("schedule"), py::arg("step"),
           "Continues at `step` with the plan of `schedule`.")
      .def(
          "control_of",
          [](const Trainer& trainer, std::int64_t parameter) {
            const Trainer::OnDevice control = trainer.control_of(parameter);
            py::object blend_ratio = py::none();
            if (control.blend_ratio.defined()) {
              blend_ratio = py::cast(control.blend_ratio);
            }
            return py::make_tuple(control.num_bits, blend_ratio, control.step);
          },
          py::arg("parameter"),
          "Width, blend ratio (None: nothing blends) and step of a parameter, each [1], on its "
          "device.")
      .def("next_drop", &Trainer::next_drop, py::arg("step"),
           "Step of the first planned drop after `step`, or None.")
      .def_property_readonly("schedule", &Trainer::schedule, py::return_value_policy::copy)
      .def_property_readonly("step", &Trainer::step, "Completed steps; waits for the device.")
      .def_property_readonly("step_on_device", &Trainer::step_on_device,
                             "Completed steps as a tensor, [1], that follows every step.")
      .def_property_readonly("step_seen", &Trainer::step_seen,
                             "Completed steps as far as the host has heard; never waits.")
      .def_property_readonly("step_at_most", &Trainer::step_at_most,
                             "Completed steps if the device skips none that the host asked for.");
}

}  // namespace moq::bindings
