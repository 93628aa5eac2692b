#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace moq::hessian {

/// How the parameters of an operator are divided among ranks; all of whom must then make the same
/// calls. Without pieces every rank holds whole parameters.
struct Sharding {
  struct Piece {
    std::vector<std::int64_t> whole;   ///< shape of the whole parameter
    std::vector<std::int64_t> offset;  ///< of this rank's first element, per dimension
  };

  /// Adds up, over all ranks that hold different pieces, one number per parameter of a block.
  using Sum = std::function<std::vector<double>(const std::vector<std::int64_t>& block,
                                                const std::vector<double>& values)>;
  /// Joins the pieces of a vector that belongs to one parameter.
  using Join = std::function<at::Tensor(std::int64_t index, const at::Tensor& piece)>;

  std::vector<Piece> pieces;  ///< one per parameter, or none
  Sum sum;
  Join join;
};

/// A symmetric matrix that says how a loss curves in a list of parameters, as a product.
class CurvatureOperator {
 public:
  explicit CurvatureOperator(std::vector<at::Tensor> parameters, Sharding sharding = {});
  virtual ~CurvatureOperator() = default;
  CurvatureOperator(const CurvatureOperator&) = delete;
  CurvatureOperator& operator=(const CurvatureOperator&) = delete;

  /// On this rank: pieces, if the operator is sharded.
  const std::vector<at::Tensor>& parameters() const { return parameters_; }

  /// The product with the matrix restricted to the rows and columns of some parameters.
  ///
  /// @param block    indices into parameters(), not empty
  /// @param vectors  v, one tensor per index, of its parameter's shape and device
  /// @return the product, likewise
  /// @throws c10::ValueError or c10::IndexError for another block or vector.
  std::vector<at::Tensor> product(std::span<const std::int64_t> block,
                                  const std::vector<at::Tensor>& vectors) const;

  /// @throws c10::ValueError if a block is empty, c10::IndexError unless it holds indices into
  ///     parameters().
  void check_block(std::span<const std::int64_t> block) const;

  /// Shape of a parameter as a whole.
  std::vector<std::int64_t> sizes(std::int64_t index) const;
  /// Elements of a parameter as a whole.
  std::int64_t numel(std::int64_t index) const;
  /// This rank's part of a vector that belongs to a parameter.
  at::Tensor cut(std::int64_t index, const at::Tensor& whole) const;
  /// The inverse of `cut`.
  at::Tensor join(std::int64_t index, const at::Tensor& piece) const;
  /// Sums over the pieces of parameters, from those over this rank's.
  std::vector<double> sum(std::span<const std::int64_t> block,
                          const std::vector<double>& values) const;

 protected:
  /// As `product`, after its checks.
  virtual std::vector<at::Tensor> multiply(std::span<const std::int64_t> block,
                                           const std::vector<at::Tensor>& vectors) const = 0;

  /// The parameters of a block.
  std::vector<at::Tensor> members(std::span<const std::int64_t> block) const;

 private:
  std::vector<at::Tensor> parameters_;
  Sharding sharding_;
};

/// x . y of each pair, summed in float64. All are asked for before the first is waited for.
std::vector<double> dots(const std::vector<at::Tensor>& x, const std::vector<at::Tensor>& y);

/// @throws c10::ValueError unless the loss is one floating-point number with a graph.
void require_loss(const at::Tensor& loss);
/// @throws c10::ValueError unless all are leaves that require a gradient.
void require_leaves(const std::vector<at::Tensor>& parameters);

}  // namespace moq::hessian
