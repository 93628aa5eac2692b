#include "csrc/hessian/finite_difference.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/common/check.h"

namespace moq::hessian {

namespace {

/// Tried in this order; neighbours are far enough apart to change which error dominates.
constexpr std::array kScales = {1.0, 8.0, 0.125, 64.0, 0.015625};
/// Share of the intended change of the gradient that a step may miss it by, either way.
constexpr double kBand = 4.0;
/// Steps at most to come into that band, and the shortest, in shares of the longest.
constexpr int kAttempts = 4;
constexpr double kShortest = 1.0 / 65536.0;
/// Products that agree so well are taken without a look at other steps.
constexpr double kGood = 0.01;
/// Times the rounding error of a gradient, over the step: below it a product is nothing but noise.
constexpr double kNoise = 32.0;

double rounding_error(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kHalf:
      return std::ldexp(1.0, -10);
    case at::kBFloat16:
      return std::ldexp(1.0, -7);
    default:
      return std::numeric_limits<float>::epsilon();
  }
}

at::ScalarType wide(at::ScalarType dtype) {
  return dtype == at::kDouble ? dtype : at::kFloat;
}

/// Memory of parameters that is written under the eyes of no graph: a tensor of its own on the same
/// memory, so that graphs which saved the parameter do not see another version of it.
std::vector<at::Tensor> memory_of(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> memory;
  memory.reserve(parameters.size());
  for (const at::Tensor& parameter : parameters) {
    memory.push_back(parameter.variable_data());
  }
  return memory;
}

/// Puts parameters at points on a line through their values, and back at the end.
class Perturbed {
 public:
  Perturbed(std::vector<at::Tensor> memory, const std::vector<at::Tensor>& directions)
      : memory_(std::move(memory)), directions_(directions) {
    for (const at::Tensor& values : memory_) {
      saved_.push_back(values.clone());
    }
  }
  ~Perturbed() {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      memory_[i].copy_(saved_[i]);
    }
  }
  Perturbed(const Perturbed&) = delete;
  Perturbed& operator=(const Perturbed&) = delete;

  void move_to(double step) {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const at::ScalarType dtype = wide(memory_[i].scalar_type());
      memory_[i].copy_(saved_[i].to(dtype).add(directions_[i].to(dtype), step));
    }
  }

 private:
  std::vector<at::Tensor> memory_;
  std::vector<at::Tensor> saved_;
  const std::vector<at::Tensor>& directions_;
};

std::vector<at::Tensor> minus(const std::vector<at::Tensor>& x, const std::vector<at::Tensor>& y) {
  std::vector<at::Tensor> result;
  result.reserve(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    result.push_back(at::sub(x[i], y[i]));
  }
  return result;
}

}  // namespace

FiniteDifferenceOperator::FiniteDifferenceOperator(Gradient gradient,
                                                   std::vector<at::Tensor> parameters,
                                                   Options options, Sharding sharding)
    : CurvatureOperator(std::move(parameters), std::move(sharding)),
      gradient_(std::move(gradient)),
      options_(options),
      scale_(options.scale),
      rate_(options.rate) {
  MOQ_CHECK(options.agreement > 0.0 && options.scale > 0.0 && options.rate >= 0.0,
            "finite_difference: agreement and scale must be > 0 and rate >= 0, got ",
            options.agreement, ", ", options.scale, " and ", options.rate);
  require_leaves(this->parameters());
}

double FiniteDifferenceOperator::length(std::span<const std::int64_t> block,
                                        const std::vector<at::Tensor>& vectors) const {
  double squares = 0.0;
  for (const double part : sum(block, dots(vectors, vectors))) {
    squares += part;
  }
  return std::sqrt(squares);
}

FiniteDifferenceOperator::Difference FiniteDifferenceOperator::difference(
    std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors,
    double step) const {
  const at::NoGradGuard no_grad;
  const std::vector<std::int64_t> indices(block.begin(), block.end());
  const std::vector<at::Tensor> parameters = members(block);
  const auto gradient = [&] {
    std::vector<at::Tensor> gradients = gradient_(indices);
    TORCH_CHECK_VALUE(gradients.size() == parameters.size(),
                      "finite_difference: the gradient must have one tensor per parameter, got ",
                      gradients.size(), " for ", parameters.size());
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      const at::ScalarType dtype = wide(parameters[i].scalar_type());
      gradients[i] =
          gradients[i].defined() ? gradients[i].to(dtype) : at::zeros_like(parameters[i], dtype);
    }
    return gradients;
  };
  Difference result{.step = step};
  std::vector<at::Tensor> behind;
  {
    Perturbed perturbed(memory_of(parameters), vectors);
    perturbed.move_to(step);
    result.product = gradient();
    perturbed.move_to(-step);
    behind = gradient();
  }
  result.gradient = std::max(length(block, result.product), length(block, behind));
  for (std::size_t i = 0; i < behind.size(); ++i) {
    result.product[i].sub_(behind[i]).div_(2.0 * step);
  }
  result.length = length(block, result.product);
  MOQ_CHECK(std::isfinite(result.length),
            "finite_difference: the products must be finite, got length ", result.length,
            ": does the loss overflow near the weights?");
  return result;
}

FiniteDifferenceOperator::Difference FiniteDifferenceOperator::first_difference(
    std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors, double direction,
    bool* sought) const {
  const std::vector<at::Tensor> parameters = members(block);
  const double values = length(block, parameters);
  const double change = std::cbrt(rounding_error(parameters.front().scalar_type()));
  const double longest = change * (values > 0.0 ? values : 1.0) / direction;
  const auto step_for = [&](double rate) {
    const double step = rate > 0.0 ? scale_ * change / (2.0 * rate * direction) : longest;
    return std::clamp(step, kShortest * longest, longest);
  };
  Difference found = difference(block, vectors, step_for(rate_));
  for (int attempt = 1; attempt < kAttempts; ++attempt) {
    const double changed = found.change() / (scale_ * change);
    const double next = step_for(found.rate(direction));
    if ((changed <= kBand && changed >= 1.0 / kBand) || next == found.step) {
      break;
    }
    *sought = true;
    Difference other = difference(block, vectors, next);
    // Where the gradient itself vanishes, any step changes all of it.
    const bool answers = next > found.step || other.change() < 0.5 * found.change();
    if (!answers) {
      rate_ = scale_ * change / (2.0 * found.step * direction);  // starts from here again
      return found;
    }
    found = std::move(other);
  }
  rate_ = found.rate(direction);
  return found;
}

std::vector<at::Tensor> FiniteDifferenceOperator::multiply(
    std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors) const {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> parameters = members(block);
  const double direction = length(block, vectors);
  MOQ_CHECK(std::isfinite(direction), "finite_difference: the vector must be finite, got length ",
            direction);
  if (direction == 0.0) {
    std::vector<at::Tensor> zeros;
    zeros.reserve(parameters.size());
    for (const at::Tensor& parameter : parameters) {
      zeros.push_back(at::zeros_like(parameter, wide(parameter.scalar_type())));
    }
    return zeros;
  }
  bool sought = rate_ == 0.0;
  const Difference usual = first_difference(block, vectors, direction, &sought);
  if (!sought && !options_.check_all) {
    return usual.product;
  }

  // A zero curvature is seen as one by the precision that products should have, float32's.
  const double epsilon = rounding_error(wide(parameters.front().scalar_type()));
  std::vector<at::Tensor> best;
  double best_scale = 0.0;
  double least = std::numeric_limits<double>::infinity();
  for (const double scale : kScales) {
    const Difference near = scale == 1.0 ? usual : difference(block, vectors, scale * usual.step);
    const Difference far = difference(block, vectors, 2.0 * scale * usual.step);
    const double apart = length(block, minus(near.product, far.product));
    const double noise = kNoise * epsilon * near.gradient / near.step;
    // Apart by no more than rounding explains: there is no curvature to be seen.
    const double disagreement = apart <= noise ? 0.0 : apart / std::max(near.length, far.length);
    if (disagreement < least) {
      least = disagreement;
      best_scale = scale;
      best = near.product;
    }
    if (least <= kGood) {
      break;
    }
  }
  MOQ_CHECK(least <= options_.agreement,
            "finite_difference: the products with two step sizes must agree within ",
            100.0 * options_.agreement, " %, got ", 100.0 * least,
            " % at best: the gradient is too coarse or not smooth (half precision, rounded "
            "activations). Compute the loss in float32 (no autocast inside loss_fn, fully_shard "
            "without a half-precision param_dtype), or use form 'exact' or 'fisher'");
  scale_ = std::clamp(scale_ * best_scale, kScales.back(), 1.0 / kScales.back());
  return best;
}

}  // namespace moq::hessian
