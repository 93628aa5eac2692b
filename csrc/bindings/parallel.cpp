#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "inference/parallel/communicator.h"
#include "inference/parallel/sharding.h"

namespace moq::bindings {
namespace {

namespace py = pybind11;
using inference::Communicator;

std::pair<std::int64_t, std::int64_t> pair_of(const inference::Range& range) {
  return {range.begin, range.end};
}

}  // namespace

void bind_parallel(py::module_& m) {
  using WithoutGil = py::call_guard<py::gil_scoped_release>;

  py::class_<Communicator, std::shared_ptr<Communicator>>(
      m, "Communicator",
      "The ranks that share one model. Every rank makes the same calls in the same order; all "
      "ranks get the same "
      "bits. Raises moq.Error naming the rank when one ends, fails or stays away.")
      .def_property_readonly("rank", &Communicator::rank, "This rank, in [0, size).")
      .def_property_readonly("size", &Communicator::size, "The number of ranks.")
      .def_property_readonly("transport", &Communicator::transport,
                             "'none', 'shared_memory' or the name of the c10d backend.")
      .def("all_reduce_sum", &Communicator::all_reduce_sum, py::arg("tensor"), WithoutGil(),
           "tensor = sum over ranks, in place. Contiguous CPU float32.")
      .def("all_reduce_max", &Communicator::all_reduce_max, py::arg("tensor"), WithoutGil(),
           "tensor = elementwise maximum over ranks, in place; NaN where any rank has NaN.")
      .def("broadcast", &Communicator::broadcast, py::arg("tensor"), py::arg("root"), WithoutGil(),
           "tensor = the tensor of rank root, in place. Contiguous CPU tensor of any dtype.")
      .def(
          "all_gather_columns",
          [](Communicator& self, const at::Tensor& shard, const std::vector<std::int64_t>& widths) {
            return self.all_gather_columns(shard, widths);
          },
          py::arg("shard"), py::arg("widths"), WithoutGil(),
          "Joins [m, widths[rank]] of all ranks to [m, sum(widths)], in rank order.")
      .def("barrier", &Communicator::barrier, WithoutGil(),
           "Returns when every rank has called it.");

  m.def("single_process", &inference::single_process,
        "The communicator of a process that holds the whole model.");
  m.def(
      "make_communicator",
      [](const std::string& process_group_name, const std::string& transport) {
        return inference::make_communicator(process_group_name,
                                            inference::parse_transport(transport));
      },
      py::arg("process_group_name"), py::arg("transport") = "auto", WithoutGil(),
      "The communicator of a c10d process group that carries CPU tensors, called by all its ranks "
      "together. "
      "transport: 'auto' (shared memory where all ranks can map it, the group's own collectives "
      "otherwise), "
      "'shared_memory' or 'c10d'.");

  m.def(
      "shard_heads",
      [](std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t rank, std::int64_t size) {
        const inference::HeadShard shard =
            inference::shard_heads(num_heads, num_kv_heads, rank, size);
        return std::pair(pair_of(shard.query_heads), pair_of(shard.kv_heads));
      },
      py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("rank"), py::arg("size"),
      "((begin, end) of the query heads, (begin, end) of the KV heads) of one rank.");
  m.def(
      "shard_range",
      [](std::int64_t total, std::int64_t alignment, std::int64_t rank, std::int64_t size) {
        return pair_of(inference::shard_range(total, alignment, rank, size));
      },
      py::arg("total"), py::arg("alignment"), py::arg("rank"), py::arg("size"),
      "(begin, end) of the rows or columns of one rank, cut at multiples of alignment.");
}

}  // namespace moq::bindings
