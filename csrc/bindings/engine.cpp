#include "inference/engine/engine.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "csrc/bindings/bindings.h"
#include "csrc/ops/checks.h"
#include "inference/parallel/communicator.h"
#include "kernels/common/check.h"

namespace moq::bindings {
namespace {

namespace py = pybind11;
using inference::Engine;
using inference::FinishReason;
using inference::GenerationResult;
using inference::KvCache;

using Ids = std::vector<std::vector<std::int64_t>>;

/// What waits for another thread's call must let that thread have the interpreter.
template <typename Call>
auto without_gil(const Call& call) {
  const py::gil_scoped_release release;
  return call();
}

/// One sequence's ids, without a caster for each. A tuple, because reading an element runs its
/// __index__, which could change a list.
std::vector<std::int64_t> read_row(const py::tuple& row) {
  std::vector<std::int64_t> ids(row.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    PyObject* const id = PyTuple_GET_ITEM(row.ptr(), static_cast<Py_ssize_t>(i));
    ids[i] = PyLong_AsLongLong(id);
    const bool failed = ids[i] == -1 && PyErr_Occurred() != nullptr;
    if (PyBool_Check(id) != 0 || (failed && PyErr_ExceptionMatches(PyExc_TypeError) != 0)) {
      PyErr_Clear();
      TORCH_CHECK_TYPE(false, "engine: token ids must be integers, got ", Py_TYPE(id)->tp_name);
    }
    if (failed && PyErr_ExceptionMatches(PyExc_OverflowError) != 0) {
      PyErr_Clear();
      MOQ_CHECK(false, "engine: a token must lie in the vocabulary, got ",
                py::repr(id).cast<std::string>());
    }
    if (failed) {
      throw py::error_already_set();
    }
  }
  return ids;
}

/// Ids of every sequence: of a tensor [sequences, tokens], or of a list of lists.
Ids read_ids(const py::object& rows) {
  Ids ids;
  if (THPVariable_Check(rows.ptr())) {
    const at::Tensor given = THPVariable_Unpack(rows.ptr());
    TORCH_CHECK_TYPE(at::isIntegralType(given.scalar_type(), /*includeBool=*/false),
                     "engine: token ids must be integers, got ", ops::name_of(given.scalar_type()));
    TORCH_CHECK_VALUE(given.dim() == 2, "engine: token ids must be [batch, length], got shape ",
                      given.sizes());
    const bool lies_ready =
        given.is_cpu() && given.scalar_type() == at::kLong && given.is_contiguous();
    const at::Tensor table =  // of a GPU only once what computes the ids has ended
        lies_ready ? given
                   : without_gil([&] { return given.to(at::kCPU, at::kLong).contiguous(); });
    const auto* const first = table.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < table.size(0); ++i) {
      ids.emplace_back(first + i * table.size(1), first + (i + 1) * table.size(1));
    }
    return ids;
  }
  for (const py::handle row : py::tuple(rows)) {
    ids.push_back(read_row(py::tuple(py::reinterpret_borrow<py::object>(row))));
  }
  return ids;
}

/// What a caller wants to be computed.
struct Sequences {
  Ids token_ids;
  Ids token_types;
  std::vector<inference::TokenSequence> all;  ///< of these

  Sequences(const py::object& ids, const py::object& types)
      : token_ids(read_ids(ids)), token_types(read_ids(types)), all(token_ids.size()) {
    TORCH_CHECK_VALUE(!token_ids.empty(),
                      "engine: token ids must be those of at least one sequence, got none");
    MOQ_CHECK(token_types.empty() || token_types.size() == token_ids.size(),
              "engine: token_types must be empty or one list per sequence, got ",
              token_types.size(), " for ", token_ids.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i].token_ids = token_ids[i];
      if (!token_types.empty()) {
        all[i].token_types = token_types[i];
      }
    }
  }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;
};

/// Engine::outside_captures as a context manager.
class OutsideCaptures {
 public:
  explicit OutsideCaptures(const Engine& engine) : engine_(engine) {}
  void enter() { scope_ = engine_.outside_captures(); }
  void exit(const py::args&) { scope_.reset(); }

 private:
  const Engine& engine_;
  std::unique_ptr<inference::DeviceScope> scope_;
};

void bind_kv_cache(py::module_& m) {
  py::class_<KvCache>(
      m, "KvCache", "Keys and values of several sequences, one a slot; made by Engine.make_cache.")
      .def_property_readonly("num_slots", &KvCache::num_slots)
      .def_property_readonly("capacity", &KvCache::capacity, "Tokens that a slot can hold.")
      .def_property_readonly("num_free_slots", &KvCache::num_free_slots)
      .def("allocate", &KvCache::allocate, "Takes a free slot for a new sequence.")
      .def("free", &KvCache::free, py::arg("slot"), "Gives a sequence's slot back.")
      .def("fork", &KvCache::fork, py::arg("slot"),
           "Takes a free slot for a copy of a sequence, and returns it.")
      .def(
          "reorder",
          [](KvCache& cache, std::vector<std::int64_t> slots,
             const std::vector<std::int64_t>& sources) {
            cache.reorder(slots, sources);
            return slots;
          },
          py::arg("slots"), py::arg("sources"),
          "Row i continues what row sources[i] of slots held; returns the rows' slots.")
      .def("length", &KvCache::length, py::arg("slot"), "Tokens that a sequence holds.")
      .def("truncate", &KvCache::truncate, py::arg("slot"), py::arg("length"),
           "Forgets a sequence's tokens from length on.");
}

void bind_results(py::module_& m) {
  py::enum_<FinishReason>(m, "FinishReason", "Why a generated row ended.")
      .value("length", FinishReason::kLength, "max_new_tokens were drawn")
      .value("stop_token", FinishReason::kStopToken, "a stop token was drawn")
      .value("stopped", FinishReason::kStopped, "the callback ended the row");
  py::class_<inference::GeneratedRow>(m, "GeneratedRow", "What one prompt was continued with.")
      .def_readonly("tokens", &inference::GeneratedRow::tokens, "The new token ids.")
      .def_readonly("finish_reason", &inference::GeneratedRow::finish_reason);
  py::class_<GenerationResult>(m, "GenerationResult", "Generated rows and how long they took.")
      .def_readonly("rows", &GenerationResult::rows)
      .def_readonly("prompt_tokens", &GenerationResult::prompt_tokens)
      .def_readonly("prefill_seconds", &GenerationResult::prefill_seconds)
      .def_readonly("decode_tokens", &GenerationResult::decode_tokens)
      .def_readonly("decode_seconds", &GenerationResult::decode_seconds);
  py::class_<inference::Encoding>(m, "Encoding", "What an encoder computed, packed by sequence.")
      .def_readonly("last_hidden_state", &inference::Encoding::last_hidden_state,
                    "[num_tokens, hidden_size] float32")
      .def_property_readonly(
          "pooled",
          [](const inference::Encoding& e) {
            return e.pooled.defined() ? std::optional(e.pooled) : std::nullopt;
          },
          "[num_sequences, hidden_size] float32, or None without a pooler")
      .def_property_readonly(
          "logits",
          [](const inference::Encoding& e) {
            return e.logits.defined() ? std::optional(e.logits) : std::nullopt;
          },
          "[num_sequences, num_labels] float32, or None without a classifier");
}

Engine open_engine(const std::filesystem::path& directory, const std::string& device,
                   std::optional<std::string> dtype, std::optional<std::string> compute_dtype,
                   std::optional<std::string> kv_cache_dtype, std::optional<bool> quantize_head,
                   std::optional<std::string> activations,
                   std::optional<std::filesystem::path> policy,
                   std::shared_ptr<inference::Communicator> communicator,
                   std::string device_group) {
  const py::gil_scoped_release release;
  const inference::EngineOptions options{.dtype = std::move(dtype),
                                         .quantize_head = quantize_head,
                                         .compute_dtype = std::move(compute_dtype),
                                         .kv_cache_dtype = std::move(kv_cache_dtype),
                                         .device = at::Device(device),
                                         .activations = std::move(activations),
                                         .policy = std::move(policy),
                                         .device_group = std::move(device_group),
                                         .communicator = std::move(communicator)};
  return Engine::open(directory, options);
}

GenerationResult generate(Engine& engine, const py::object& prompts, std::int64_t max_new_tokens,
                          float temperature, std::int64_t top_k, float top_p, float min_p,
                          float repetition_penalty, std::uint64_t seed,
                          std::vector<std::int64_t> stop_tokens, std::int64_t max_batch,
                          std::optional<std::int64_t> chunk_tokens,
                          const std::optional<inference::OnToken>& on_token) {
  const inference::GenerationOptions options{.max_new_tokens = max_new_tokens,
                                             .sampling = {.temperature = temperature,
                                                          .top_k = top_k,
                                                          .top_p = top_p,
                                                          .min_p = min_p,
                                                          .repetition_penalty = repetition_penalty,
                                                          .seed = seed},
                                             .stop_tokens = std::move(stop_tokens),
                                             .max_batch = max_batch,
                                             .chunk_tokens = chunk_tokens};
  const auto outside_captures = engine.outside_captures();
  const Ids token_ids = read_ids(prompts);
  const py::gil_scoped_release release;  // a Python callback takes the lock by itself
  return engine.generate(token_ids, options, on_token.value_or(inference::OnToken{}));
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<OutsideCaptures>(m, "OutsideCaptures", "Made by Engine.outside_captures.")
      .def("__enter__", &OutsideCaptures::enter)
      .def("__exit__", &OutsideCaptures::exit);
  bind_kv_cache(m);
  bind_results(m);
  py::class_<Engine>(m, "Engine",
                     "A model of a checkpoint directory; moq.inference.Engine wraps it.")
      .def_static("open", &open_engine, py::arg("directory"), py::kw_only(),
                  py::arg("device") = "cpu", py::arg("dtype") = py::none(),
                  py::arg("compute_dtype") = py::none(), py::arg("kv_cache_dtype") = py::none(),
                  py::arg("quantize_head") = py::none(), py::arg("activations") = py::none(),
                  py::arg("policy") = py::none(), py::arg("communicator") = py::none(),
                  py::arg("device_group") = "",
                  "Loads the share of the communicator's rank (None: the whole model). policy is "
                  "the path of a JSON file.")
      .def(
          "generate", &generate, py::arg("prompts"), py::kw_only(), py::arg("max_new_tokens"),
          py::arg("temperature") = 0.0F, py::arg("top_k") = 0, py::arg("top_p") = 1.0F,
          py::arg("min_p") = 0.0F, py::arg("repetition_penalty") = 1.0F, py::arg("seed") = 0,
          py::arg("stop_tokens") = std::vector<std::int64_t>{}, py::arg("max_batch") = 16,
          py::arg("chunk_tokens") = py::none(), py::arg("on_token") = py::none(),
          "Continues prompts (lists of token ids), which are read in pieces of chunk_tokens "
          "tokens together (None: as many as are fast); on_token(row, token) -> bool ends a row by "
          "returning False. Releases the interpreter lock.")
      .def(
          "forward",
          [](Engine& engine, const py::object& token_ids, const py::object& token_types,
             KvCache* cache, const std::vector<std::int64_t>& slots) {
            const auto outside_captures = engine.outside_captures();
            const Sequences sequences(token_ids, token_types);
            const py::gil_scoped_release release;
            return engine.forward(sequences.all, cache, slots);
          },
          py::arg("token_ids"), py::arg("token_types") = py::tuple(), py::arg("cache") = py::none(),
          py::arg("slots") = std::vector<std::int64_t>{},
          "Logits of every token, packed by sequence: [num_tokens, vocab_size] float32.")
      .def(
          "encode",
          [](Engine& engine, const py::object& token_ids, const py::object& token_types) {
            const auto outside_captures = engine.outside_captures();
            const Sequences sequences(token_ids, token_types);
            const py::gil_scoped_release release;
            return engine.encode(sequences.all);
          },
          py::arg("token_ids"), py::arg("token_types") = py::tuple(),
          "Hidden states, pooled outputs and class logits of whole sequences: lists of token ids, "
          "or an integer tensor [sequences, tokens].")
      .def(
          "outside_captures", [](const Engine& engine) { return OutsideCaptures(engine); },
          py::keep_alive<0, 1>(),
          "For `with`: the thread may use the GPU while others capture CUDA graphs there. An error "
          "if its own current stream is being captured. Calls of the engine do so by themselves.")
      .def("release_graphs", &Engine::release_graphs, py::call_guard<py::gil_scoped_release>(),
           "Frees captured steps, which hold the ranks' communicator.")
      .def("make_cache", &Engine::make_cache, py::arg("num_slots"), py::arg("capacity"),
           py::call_guard<py::gil_scoped_release>(), "A cache for sequences of forward.")
      .def_property_readonly("architecture", [](const Engine& e) { return e.spec().architecture; })
      .def_property_readonly("policy", &Engine::policy_name)
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.spec().vocab_size; })
      .def_property_readonly("hidden_size", [](const Engine& e) { return e.spec().hidden_size; })
      .def_property_readonly("num_layers", [](const Engine& e) { return e.spec().num_layers; })
      .def_property_readonly("num_token_types",
                             [](const Engine& e) { return e.spec().num_token_types; })
      .def_property_readonly("max_positions",
                             [](const Engine& e) { return e.spec().max_positions; })
      .def_property_readonly("has_head", [](const Engine& e) { return e.spec().has_head; })
      .def_property_readonly(
          "causal",
          [](const Engine& e) { return e.spec().attention == inference::AttentionKind::kCausal; })
      .def_property_readonly("activations", &Engine::activations,
                             "How projections read their inputs: weight_only, dynamic, static, "
                             "dynamic_asymmetric or static_asymmetric.")
      .def_property_readonly("weight_format", &Engine::weight_format,
                             "What the layers' projections are stored in.")
      .def_property_readonly("head_format", &Engine::head_format,
                             "What the language-model head is stored in; empty without one.")
      .def_property_readonly(
          "weight_bytes",
          [](const Engine& e) { return without_gil([&] { return e.memory(); }).weights; },
          "Bytes of this rank's weights.")
      .def_property_readonly(
          "device", [](const Engine& e) { return e.model().device().str(); },
          "Where it computes: cpu, or cuda:0.")
      .def_property_readonly(
          "compute_dtype", [](const Engine& e) { return e.model().compute_dtype(); },
          "What activations are kept in.")
      .def_property_readonly(
          "kv_cache_dtype", [](const Engine& e) { return e.model().kv_cache_dtype(); },
          "What keys and values are kept in.")
      .def(
          "decode_kernels",
          [](const Engine& e) {
            py::list kernels;
            for (const inference::KernelRecord& kernel :
                 without_gil([&] { return e.decode_kernels(); })) {
              kernels.append(
                  py::make_tuple(kernel.what, kernel.rows, kernel.columns, kernel.bytes));
            }
            return kernels;
          },
          "Kernels of the last captured decode step, in order: (what, rows, columns, least bytes "
          "read). Empty on the CPU.")
      .def(
          "memory_report",
          [](const Engine& e) {
            const inference::MemoryReport report = without_gil([&] { return e.memory(); });
            py::dict sizes;
            sizes["weights"] = report.weights;
            sizes["kv_cache"] = report.kv_cache;
            sizes["workspace"] = report.workspace;
            return sizes;
          },
          "Bytes that the engine holds on its device.")
      .def_property_readonly("communicator", &Engine::communicator,
                             "The ranks that share the model.")
      .def_property_readonly("rank",
                             [](const Engine& e) { return e.model().communicator().rank(); })
      .def_property_readonly("tp_size",
                             [](const Engine& e) { return e.model().communicator().size(); })
      .def_property_readonly("transport",
                             [](const Engine& e) { return e.model().communicator().transport(); });
}

}  // namespace moq::bindings
