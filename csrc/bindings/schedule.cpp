#include "csrc/schedule/state.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "csrc/schedule/config.h"
#include "csrc/schedule/target_bits.h"
#include "kernels/common/check.h"

namespace moq::bindings {

namespace {

namespace py = pybind11;
using schedule::Geometric;
using schedule::Plan;
using schedule::Schedule;
using schedule::ScheduleConfig;
using schedule::ScheduledBlock;
using schedule::Table;

/// Plans cross the boundary as [[(step, bits), …], …].
std::vector<std::vector<std::pair<std::int64_t, int>>> as_pairs(const Plan& plan) {
  std::vector<std::vector<std::pair<std::int64_t, int>>> blocks;
  for (const schedule::BlockPlan& drops : plan) {
    auto& block = blocks.emplace_back();
    for (const schedule::Drop& drop : drops) {
      block.emplace_back(drop.step, drop.bits);
    }
  }
  return blocks;
}

/// A state is a JSON text in C++ and what Python makes of it in Python.
py::object state_dict(const Schedule& self) {
  return py::module_::import("json").attr("loads")(schedule::to_json(self));
}

Schedule from_state_dict(const py::dict& state) {
  return schedule::from_json(py::module_::import("json").attr("dumps")(state).cast<std::string>());
}

py::list unfinished_of(const Schedule& self) {
  py::list late;
  for (const schedule::Unfinished& block : schedule::unfinished(self.config())) {
    py::dict entry;
    entry["block"] = block.block;
    entry["arrival"] = block.arrival;
    entry["bits"] = block.bits;
    entry["largest_period"] = block.largest_period;
    late.append(entry);
  }
  return late;
}

schedule::ParetoFront front_of(
    const std::vector<std::string>& names,
    const std::vector<std::vector<std::pair<std::int64_t, double>>>& options) {
  MOQ_CHECK(names.size() == options.size(), "ParetoFront: options must have one list a name, got ",
            options.size(), " for ", names.size());
  std::vector<schedule::BlockOptions> blocks;
  for (std::size_t i = 0; i < names.size(); ++i) {
    schedule::BlockOptions& block = blocks.emplace_back();
    block.name = names[i];
    for (const auto& [cost, loss] : options[i]) {
      block.options.push_back({.cost = cost, .loss = loss});
    }
  }
  return schedule::ParetoFront(blocks);
}

void bind_target_bits(py::module_& m) {
  using schedule::FrontPoint;
  using schedule::ParetoFront;
  py::class_<ParetoFront>(
      m, "ParetoFront",
      "Every choice of one option per block that no other beats in cost and loss, exactly "
      "(csrc/schedule/target_bits.h).")
      .def(py::init(&front_of), py::arg("names"), py::arg("options"),
           py::call_guard<py::gil_scoped_release>(),
           "Options are [[(cost, loss), ...], ...], costs integers. Raises moq.Error naming the "
           "block whose options have no meaning.")
      .def_property_readonly(
          "points",
          [](const ParetoFront& self) {
            std::vector<std::pair<std::int64_t, double>> points;
            for (const FrontPoint& point : self.points()) {
              points.emplace_back(point.cost, point.loss);
            }
            return points;
          },
          "[(cost, loss), ...]: costs rise, losses fall.")
      .def("choice", &ParetoFront::choice, py::arg("point"),
           "The index of each block's option behind point number `point`.")
      .def("within", &ParetoFront::within, py::arg("budget"),
           "Number of the point of least loss whose cost is at most `budget`; moq.Error names "
           "the smallest feasible one.");
}

}  // namespace

void bind_schedule(py::module_& m) {
  bind_target_bits(m);
  py::class_<ScheduledBlock>(
      m, "ScheduledBlock",
      "One block of a Schedule: a name for messages and the rule its width follows.")
      .def(
          py::init([](std::string name, int start_bits, int target_bits, std::int64_t period,
                      std::int64_t offset, double growth, std::optional<double> finish_at,
                      std::int64_t counts_per_step) {
            return ScheduledBlock{std::move(name),
                                  Geometric{start_bits, target_bits, period, offset, growth,
                                            finish_at, counts_per_step}};
          }),
          py::arg("name"), py::kw_only(), py::arg("start_bits") = 16, py::arg("target_bits") = 8,
          py::arg("period") = 1, py::arg("offset") = 0, py::arg("growth") = 2.0,
          py::arg("finish_at") = py::none(), py::arg("counts_per_step") = 0,
          "One bit less at a time: `offset` steps, then `period` steps at start_bits, then "
          "`growth` times as long at each following width. The slowest of the blocks with the "
          "same finish_at arrives at that share of the training: only the ratio of their periods "
          "counts. With counts_per_step a count that grows by so many a step: the width falls when "
          "it reaches period, and each next time at growth times (and stretch times) that count.")
      .def_static(
          "from_table",
          [](std::string name, Table table) {
            return ScheduledBlock{std::move(name), std::move(table)};
          },
          py::arg("name"), py::arg("table"),
          "A fixed {step: bits}; the first entry is at step 0, bits fall strictly.")
      .def_readonly("name", &ScheduledBlock::name);

  py::class_<Schedule>(
      m, "Schedule",
      "The bit width of every block after every optimizer step: a pure function of the "
      "configuration and of the sensitivities given so far (csrc/schedule/schedule.h).")
      .def(py::init([](std::vector<ScheduledBlock> blocks, std::int64_t total_steps,
                       const std::string& on_unfinished, std::string stretch_rule) {
             return Schedule(
                 ScheduleConfig{.blocks = std::move(blocks),
                                .total_steps = total_steps,
                                .on_unfinished = schedule::parse_on_unfinished(on_unfinished),
                                .stretch_rule = std::move(stretch_rule)});
           }),
           py::arg("blocks"), py::arg("total_steps"), py::kw_only(),
           py::arg("on_unfinished") = "error", py::arg("stretch_rule") = "none",
           "Raises moq.Error if a value is out of range, or if a block might not reach its "
           "target by total_steps and on_unfinished is 'error'.")
      .def("bits_at", &Schedule::bits_at, py::arg("block"), py::arg("step"),
           "Width of block number `block` after `step` completed optimizer steps.")
      .def("finished", &Schedule::finished, py::arg("step"),
           "True if every block has its target width after `step` steps.")
      .def("set_sensitivities", &Schedule::set_sensitivities, py::arg("step"),
           py::arg("sensitivities"),
           "Re-plans everything after `step` with one sensitivity in [0, 1] per block.")
      .def(
          "plan", [](const Schedule& self) { return as_pairs(self.plan()); },
          "[[(step, bits), ...], ...]: per block each width and the step from which it holds.")
      .def(
          "bounds",
          [](const Schedule& self) {
            const schedule::Bounds bounds = schedule::bounds(self.config());
            return std::pair(as_pairs(bounds.earliest), as_pairs(bounds.latest));
          },
          "(earliest, latest): two plans between which each drop lies, whatever is measured; with "
          "finish_at to within a step, whatever one measurement says.")
      .def_property_readonly(
          "measured", [](const Schedule& self) { return !self.measurements().empty(); },
          "True if the plan follows sensitivities that were measured.")
      .def_property("completed_steps", &Schedule::completed_steps, &Schedule::set_completed_steps,
                    "Steps that have been made, 0 unless set: printed, the drops up to then have "
                    "one step, and ranges begin after it. No part of the state.")
      .def("unfinished", &unfinished_of,
           "Blocks that might miss total_steps: dicts of block, arrival, bits, largest_period.")
      .def_property_readonly("num_blocks", &Schedule::num_blocks)
      .def_property_readonly("total_steps",
                             [](const Schedule& self) { return self.config().total_steps; })
      .def_property_readonly("block_names",
                             [](const Schedule& self) {
                               std::vector<std::string> names;
                               for (const ScheduledBlock& block : self.config().blocks) {
                                 names.push_back(block.name);
                               }
                               return names;
                             })
      .def("state_dict", &state_dict,
           "A plain dict (numbers, strings, lists) from which from_state_dict makes an equal "
           "schedule.")
      .def_static("from_state_dict", &from_state_dict, py::arg("state"),
                  "Raises moq.Error naming the key that is missing or out of range.")
      .def(
          "__str__",
          [](const py::object& self) {
            return py::module_::import("moq.schedule").attr("table_of")(self);
          },
          "A table: for every block the step from which it has each width.")
      .def(
          "plot",
          [](const py::object& self, const py::object& path) {
            py::module_::import("moq.schedule").attr("plot_schedule")(self, path);
          },
          py::arg("path"), "Draws bits over steps to a .png or .svg file; needs matplotlib.");

  m.def(
      "stretch",
      [](const std::string& rule, double sensitivity) {
        return std::ldexp(static_cast<double>(schedule::stretch(rule, sensitivity)), -16);
      },
      py::arg("rule"), py::arg("sensitivity"),
      "The factor by which a rule stretches residence times; sensitivity in [0, 1].");
  m.def("stretch_rules", &schedule::stretch_rules,
        "Names of the rules by which a sensitivity stretches residence times.");
}

}  // namespace moq::bindings
