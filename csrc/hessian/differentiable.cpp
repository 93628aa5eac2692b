#include "csrc/hessian/differentiable.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <unordered_set>
#include <utility>

namespace moq::hessian {

namespace {

using torch::autograd::Error;
using torch::autograd::Node;
using torch::autograd::variable_list;

/// Calls visit(node) once for every node from which the gradient flows on.
void for_each_node(const std::vector<at::Tensor>& roots, const std::function<void(Node&)>& visit) {
  std::vector<Node*> pending;
  std::unordered_set<Node*> seen;
  const auto push = [&](Node* node) {
    if (node != nullptr && seen.insert(node).second) {
      pending.push_back(node);
    }
  };
  for (const at::Tensor& root : roots) {
    push(root.defined() ? root.grad_fn().get() : nullptr);
  }
  while (!pending.empty()) {
    Node* node = pending.back();
    pending.pop_back();
    visit(*node);
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      push(edge.function.get());
    }
  }
}

bool any_requires_grad(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& t) { return t.defined() && t.requires_grad(); });
}

bool any_defined(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& t) { return t.defined(); });
}

/// True if nothing comes out of `node` whatever comes in, as in the backward pass of floor, round
/// and sign. A gradient of our own asks, since the present one may be zero for another reason.
bool is_zero_operator(Node& node, variable_list incoming) {
  const at::NoGradGuard no_grad;
  for (at::Tensor& gradient : incoming) {
    if (gradient.defined()) {
      // Numbers that no operation singles out, without touching the generators.
      const at::Tensor counts = at::ones_like(gradient, at::kFloat).flatten().cumsum(0);
      gradient = counts.sin().to(gradient.scalar_type()).view(gradient.sizes());
    }
  }
  const variable_list outgoing = node(std::move(incoming));
  return std::none_of(outgoing.begin(), outgoing.end(), [](const at::Tensor& t) {
    return t.defined() && t.ne(0).any().item<bool>();
  });
}

/// The node that autograd puts where an operation has no second derivative, or null.
const Error* as_error(const Node* node) {
  return dynamic_cast<const Error*>(node);
}

}  // namespace

struct GraphCheck::Watch {
  struct Hook : torch::autograd::FunctionPostHook {
    Hook(Watch* watch, Node* node) : watch(watch), node(node) {}

    variable_list operator()(const variable_list& outputs, const variable_list& inputs) override {
      if (any_requires_grad(inputs) && any_defined(outputs) && !any_requires_grad(outputs) &&
          !is_zero_operator(*node, inputs)) {
        watch->report(node->name() + ", whose backward pass leaves the autograd graph");
      }
      for (const at::Tensor& output : outputs) {
        if (const Error* error = output.defined() ? as_error(output.grad_fn().get()) : nullptr) {
          watch->report(node->name() + ": " + error->msg);
        }
      }
      return outputs;
    }

    Watch* watch;
    Node* node;  ///< owns this hook
  };

  void report(const std::string& text) {
    const std::lock_guard lock(mutex);
    if (offender.empty()) {
      offender = text;
    }
  }

  std::mutex mutex;      ///< the engine runs nodes of different devices on different threads
  std::string offender;  ///< the first node that cannot be differentiated again, and why
  std::vector<std::pair<std::shared_ptr<Node>, std::uintptr_t>> hooks;
};

GraphCheck::GraphCheck(const at::Tensor& loss) : watch_(std::make_unique<Watch>()) {
  for_each_node({loss}, [&](Node& node) {
    // This one refuses every gradient that is asked for by its parameters, the first included.
    TORCH_CHECK_NOT_IMPLEMENTED(
        node.name() != "CheckpointFunctionBackward",
        "curvature: every operation must be twice differentiable, got torch.utils.checkpoint with "
        "use_reentrant=True. Use use_reentrant=False, or form 'finite_difference'");
    // A node without outputs is the end at a parameter, and outlives this graph.
    if (node.num_outputs() > 0) {
      const auto key = node.add_post_hook(std::make_unique<Watch::Hook>(watch_.get(), &node));
      watch_->hooks.emplace_back(node.getptr(), key);
    }
  });
}

GraphCheck::~GraphCheck() {
  for (const auto& [node, key] : watch_->hooks) {
    node->del_post_hook(key);
  }
}

void GraphCheck::throw_unless_differentiable(const std::vector<at::Tensor>& gradients) const {
  for_each_node(gradients, [&](Node& node) {
    if (const Error* error = as_error(&node)) {
      watch_->report(error->msg);
    }
  });
  TORCH_CHECK_NOT_IMPLEMENTED(
      watch_->offender.empty(), "curvature: every operation must be twice differentiable, got ",
      watch_->offender,
      ". Use a form of the model without it while measuring (an unfused layer, another attention "
      "implementation), or form 'finite_difference'");
}

}  // namespace moq::hessian
