#pragma once

// The Lanczos process (Paige 1972; Parlett, "The Symmetric Eigenvalue Problem", chapter 13).
//
// After j products the columns of V [n, j] are an orthonormal basis of the Krylov space of A and
// v_1, T [j, j] is tridiagonal with diagonal alpha and off-diagonal beta, and
//
//   A V = V T + beta_j v_(j+1) e_j'.
//
// The relation survives rounding; the orthogonality of V does not, and with it go the eigenvalues
// of T (copies of converged ones appear). Every new vector is therefore orthogonalised against all
// earlier ones by Gram and Schmidt's classical process, twice: "twice is enough" (Parlett, 6.9;
// Giraud, Langou, Rozloznik 2005).
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "csrc/hessian/solvers/vectors.h"
#include "kernels/common/parallel.h"

namespace moq::hessian {

using TridiagonalSolver = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>;

/// V, T and beta_j of a growing j. Holds j + 1 vectors of n Scalars.
template <typename Scalar>
class LanczosProcess {
 public:
  /// @param start  v_1, a unit vector
  /// @param where  begins the messages of errors
  LanczosProcess(const Operator<Scalar>& product, Vector<Scalar> start, const char* where)
      : product_(product), where_(where), rest_(start.size()) {
    basis_.push_back(std::move(start));
  }

  /// Makes one product: j grows by one. Not to be called once exhausted.
  /// @throws moq::Error if the product is not finite.
  void step() {
    if (!alpha_.empty()) {
      basis_.push_back(rest_ * static_cast<Scalar>(1.0 / beta_.back()));
    }
    product_(view(std::as_const(basis_.back())), view(rest_));
    const std::vector<double> first = sweep();
    alpha_.push_back(first.back());
    MOQ_CHECK(std::isfinite(alpha_.back()), where_, ": the products must be finite, got ",
              alpha_.back(), " in product ", size());
    beta_.push_back(subtract(sweep(first)));
  }

  /// j, the number of products made.
  int size() const { return static_cast<int>(alpha_.size()); }

  /// beta_j.
  double beta() const { return beta_.back(); }

  /// True if what is left after the basis has been taken out of a product is rounding error: the
  /// basis spans an invariant subspace, and the eigenvalues of T are eigenvalues of A.
  bool exhausted() const {
    return size() == rest_.size() ||
           beta_.back() <= 8.0 * std::numeric_limits<Scalar>::epsilon() * magnitude();
  }

  /// Eigenvalues of T, rising, and its unit eigenvectors.
  TridiagonalSolver solve() const {
    const auto j = static_cast<Eigen::Index>(alpha_.size());
    TridiagonalSolver solver;
    solver.computeFromTridiagonal(Eigen::Map<const Eigen::VectorXd>(alpha_.data(), j),
                                  Eigen::Map<const Eigen::VectorXd>(beta_.data(), j - 1));
    return solver;
  }

  /// V s.
  Vector<Scalar> combine(const Eigen::VectorXd& s) const {
    Vector<Scalar> v = Vector<Scalar>::Zero(rest_.size());
    for (Eigen::Index i = 0; i < s.size(); ++i) {
      v += static_cast<Scalar>(s[i]) * basis_[static_cast<std::size_t>(i)];
    }
    return v;
  }

 private:
  /// The vectors are gone through in pieces of so many elements, which stay in the cache, so that
  /// each vector is read from memory once a sweep: bandwidth is what the process costs beside its
  /// products. Sums over a piece are Scalars, those over pieces doubles.
  static constexpr Eigen::Index kPiece = 256;
  /// Elements that a thread takes at a time. Their sums are added up in order, whichever thread
  /// made them: the result is the same on any number of threads.
  static constexpr Eigen::Index kChunk = 64 * kPiece;

  /// rest_ -= V c; returns V' rest_ of the new rest_. Without c only the latter.
  std::vector<double> sweep(const std::vector<double>& c = {}) {
    return sums(basis_.size(), [&](Eigen::Index begin, Eigen::Index length, double* dots) {
      const auto piece = subtract(c, begin, length);
      for (std::size_t i = 0; i < basis_.size(); ++i) {
        dots[i] += static_cast<double>(piece.dot(basis_[i].segment(begin, length)));
      }
    });
  }

  /// rest_ -= V c; returns the length of the new rest_.
  double subtract(const std::vector<double>& c) {
    const auto square = [&](Eigen::Index begin, Eigen::Index length, double* sum) {
      *sum += subtract(c, begin, length).template cast<double>().squaredNorm();
    };
    return std::sqrt(sums(1, square).front());
  }

  /// rest_ -= V c in one piece, which is returned.
  auto subtract(const std::vector<double>& c, Eigen::Index begin, Eigen::Index length) {
    auto piece = rest_.segment(begin, length);
    for (std::size_t i = 0; i < c.size(); ++i) {
      piece -= static_cast<Scalar>(c[i]) * basis_[i].segment(begin, length);
    }
    return piece;
  }

  /// Sums over all pieces, `count` of them, of what body(begin, length, sums) adds for one.
  template <typename Body>
  std::vector<double> sums(std::size_t count, const Body& body) const {
    const Eigen::Index chunks = (rest_.size() + kChunk - 1) / kChunk;
    std::vector<double> partial(static_cast<std::size_t>(chunks) * count, 0.0);
    kernels::parallel_for(chunks, 1, [&](Eigen::Index first, Eigen::Index last) {
      const Eigen::Index end = std::min(last * kChunk, rest_.size());
      for (Eigen::Index begin = first * kChunk; begin < end; begin += kPiece) {
        double* own = partial.data() + static_cast<std::size_t>(begin / kChunk) * count;
        body(begin, std::min(kPiece, end - begin), own);
      }
    });
    std::vector<double> total(count, 0.0);
    for (std::size_t i = 0; i < partial.size(); ++i) {
      total[i % count] += partial[i];
    }
    return total;
  }

  /// An upper bound of |T|, and so a scale for what counts as zero.
  double magnitude() const {
    double largest = 0.0;
    for (std::size_t i = 0; i < alpha_.size(); ++i) {
      largest = std::max(largest, std::abs(alpha_[i]) + (i > 0 ? beta_[i - 1] : 0.0) + beta_[i]);
    }
    return largest;
  }

  const Operator<Scalar>& product_;
  const char* where_;
  std::vector<Vector<Scalar>> basis_;  ///< columns of V
  Vector<Scalar> rest_;                ///< beta_j v_(j+1)
  std::vector<double> alpha_;          ///< [j]
  std::vector<double> beta_;           ///< [j]
};

}  // namespace moq::hessian
