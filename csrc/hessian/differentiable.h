#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace moq::hessian {

/// Finds operations whose backward pass cannot be differentiated, before a product goes wrong or,
/// worse, silently lacks their curvature.
///
/// Watches every node of the graph of `loss`, for its lifetime, while the gradient is computed with
/// create_graph. A backward pass is linear in the gradient that comes in; if that one requires a
/// gradient and nothing that comes out does, either the map is zero (floor, round, sign: there is
/// no curvature to lack) or the node has left the graph (a kernel called outside autograd, a custom
/// function under no_grad). Operations that refuse openly leave an error node in the gradient's
/// graph.
class GraphCheck {
 public:
  explicit GraphCheck(const at::Tensor& loss);
  ~GraphCheck();
  GraphCheck(const GraphCheck&) = delete;
  GraphCheck& operator=(const GraphCheck&) = delete;

  /// @param gradients  of the loss, computed with create_graph since construction
  /// @throws c10::NotImplementedError naming the operation.
  void throw_unless_differentiable(const std::vector<at::Tensor>& gradients) const;

 private:
  struct Watch;
  std::unique_ptr<Watch> watch_;
};

}  // namespace moq::hessian
