#include "csrc/hessian/sensitivity.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>

#include "csrc/hessian/solvers/random.h"
#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

namespace moq::hessian {

namespace {

/// Signs over the whole parameter, of which this rank keeps its part.
at::Tensor random_signs(const CurvatureOperator& hessian, std::int64_t index,
                        const RandomStream& stream) {
  const at::Tensor signs = at::empty(hessian.sizes(index), at::dtype(at::kFloat));
  fill_rademacher({signs.mutable_data_ptr<float>(), static_cast<std::size_t>(signs.numel())},
                  stream);
  const at::Tensor& parameter = hessian.parameters().at(static_cast<std::size_t>(index));
  return hessian.cut(index, signs).to(parameter.options());
}

bool accurate(const std::vector<std::vector<double>>& samples, double tolerance) {
  const std::vector<double> errors = standard_errors(samples);
  double largest_trace = 0.0;
  for (std::size_t block = 0; block < errors.size(); ++block) {
    double sum = 0.0;
    for (const std::vector<double>& sample : samples) {
      sum += sample[block];
    }
    largest_trace = std::max(largest_trace, std::abs(sum) / static_cast<double>(samples.size()));
  }
  return *std::max_element(errors.begin(), errors.end()) <= tolerance * largest_trace;
}

/// The block's parameters as consecutive pieces of one vector.
template <typename Scalar>
std::vector<at::Tensor> split(const CurvatureOperator& hessian,
                              const std::vector<std::int64_t>& block,
                              std::span<const Scalar> flat) {
  std::vector<at::Tensor> pieces;
  std::size_t begin = 0;
  for (const std::int64_t index : block) {
    const at::Tensor& parameter = hessian.parameters()[static_cast<std::size_t>(index)];
    // The view is only read.
    auto* data = const_cast<Scalar*>(flat.data()) + begin;  // NOLINT
    const at::Tensor whole = at::from_blob(data, hessian.sizes(index),
                                           at::dtype(c10::CppTypeToScalarType<Scalar>::value));
    pieces.push_back(hessian.cut(index, whole).to(parameter.options()));
    begin += static_cast<std::size_t>(whole.numel());
  }
  return pieces;
}

template <typename Scalar>
void join(const CurvatureOperator& hessian, const std::vector<std::int64_t>& block,
          const std::vector<at::Tensor>& pieces, std::span<Scalar> flat) {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < block.size(); ++i) {
    const at::Tensor whole = hessian.join(block[i], pieces[i]);
    at::from_blob(flat.data() + begin, whole.sizes(),
                  at::dtype(c10::CppTypeToScalarType<Scalar>::value))
        .copy_(whole);
    begin += static_cast<std::size_t>(whole.numel());
  }
}

template <typename Scalar>
LanczosResult<double> eigenvalues_in(const CurvatureOperator& hessian,
                                     const std::vector<std::int64_t>& block,
                                     const EigenOptions& options, const Progress& progress) {
  std::int64_t size = 0;
  for (const std::int64_t index : block) {
    size += hessian.numel(index);
  }
  std::int64_t products = 0;
  const Operator<Scalar> product = [&](std::span<const Scalar> x, std::span<Scalar> y) {
    join(hessian, block, hessian.product(block, split(hessian, block, x)), y);
    if (progress) {
      progress(++products);
    }
  };
  const kernels::ThreadScope threads(at::get_num_threads());
  const LanczosResult<Scalar> result = lanczos(product, size, options);
  return {.largest = {result.largest.value, result.largest.residual, {}},
          .smallest = {result.smallest.value, result.smallest.residual, {}},
          .iterations = result.iterations,
          .converged = result.converged};
}

}  // namespace

std::vector<double> standard_errors(const std::vector<std::vector<double>>& samples) {
  MOQ_CHECK(samples.size() >= 2, "standard_errors: there must be at least 2 samples, got ",
            samples.size());
  const auto count = static_cast<double>(samples.size());
  std::vector<double> errors(samples.front().size());
  for (std::size_t block = 0; block < errors.size(); ++block) {
    double mean = 0.0;
    for (const std::vector<double>& sample : samples) {
      mean += sample[block] / count;
    }
    double squares = 0.0;
    for (const std::vector<double>& sample : samples) {
      squares += (sample[block] - mean) * (sample[block] - mean);
    }
    errors[block] = std::sqrt(squares / (count - 1.0) / count);
  }
  return errors;
}

TraceSamples hutchinson_traces(const CurvatureOperator& hessian, const Blocks& blocks,
                               const TraceOptions& options, const Progress& progress) {
  MOQ_CHECK(options.tolerance > 0.0, "trace: tolerance must be > 0, got ", options.tolerance);
  MOQ_CHECK(options.min_products >= 2 && options.max_products >= options.min_products,
            "trace: 2 <= min_products <= max_products must hold, got ", options.min_products,
            " and ", options.max_products);
  std::vector<std::int64_t> all;
  for (const std::vector<std::int64_t>& block : blocks) {
    all.insert(all.end(), block.begin(), block.end());
  }
  hessian.check_block(all);
  TraceSamples traces;
  for (std::int64_t k = 0; k < options.max_products && !traces.converged; ++k) {
    std::vector<at::Tensor> signs;
    signs.reserve(all.size());
    for (const std::int64_t index : all) {
      signs.push_back(random_signs(hessian, index,
                                   {.seed = options.seed,
                                    .tensor = static_cast<std::uint32_t>(index),
                                    .probe = static_cast<std::uint32_t>(k),
                                    .batch = options.batch}));
    }
    const std::vector<double> traces_of_parameters =
        hessian.sum(all, dots(signs, hessian.product(all, signs)));
    auto& sample = traces.samples.emplace_back();
    std::size_t position = 0;
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      double trace = 0.0;
      for (std::size_t i = 0; i < blocks[b].size(); ++i, ++position) {
        trace += traces_of_parameters[position];
      }
      MOQ_CHECK(std::isfinite(trace), "trace: the products must be finite, got ", trace,
                " in block ", options.names.empty() ? std::to_string(b) : options.names.at(b),
                ": does the loss overflow in the parameters' dtype?");
      sample.push_back(trace);
    }
    traces.converged = k + 1 >= options.min_products && accurate(traces.samples, options.tolerance);
    if (progress) {
      progress(k + 1);
    }
    if (k >= 1 && !traces.converged && options.enough && options.enough()) {
      break;
    }
  }
  return traces;
}

LanczosResult<double> block_eigenvalues(const CurvatureOperator& hessian,
                                        const std::vector<std::int64_t>& block,
                                        const EigenOptions& options, const Progress& progress) {
  hessian.check_block(block);
  const auto first = static_cast<std::size_t>(block.front());
  return hessian.parameters().at(first).scalar_type() == at::kDouble
             ? eigenvalues_in<double>(hessian, block, options, progress)
             : eigenvalues_in<float>(hessian, block, options, progress);
}

}  // namespace moq::hessian
