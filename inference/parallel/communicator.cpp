#include "inference/parallel/communicator.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <exception>
#include <utility>

#include "inference/parallel/communicator_checks.h"
#include "inference/parallel/communicator_local.h"
#include "kernels/common/check.h"

namespace moq::inference {
namespace {

class SingleProcess final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string transport() const override { return "none"; }

  void all_reduce_sum(at::Tensor& tensor) override {
    detail::check_float32("all_reduce_sum", tensor);
  }
  void all_reduce_max(at::Tensor& tensor) override {
    detail::check_float32("all_reduce_max", tensor);
  }
  void broadcast(at::Tensor& tensor, int root) override {
    detail::check_contiguous("broadcast", tensor);
    detail::check_root(root, 1);
  }
  void all_gather_columns_into(const at::Tensor& shard, std::span<const std::int64_t> widths,
                               at::Tensor& joined) override {
    const std::int64_t total = detail::check_columns(shard, widths, 0, 1);
    detail::shape_result(joined, shard.size(0), total);
    joined.copy_(shard);
  }
  void barrier() override {}
};

class SharedMemoryCommunicator final : public Communicator {
 public:
  explicit SharedMemoryCommunicator(std::unique_ptr<SharedMemoryGroup> group)
      : group_(std::move(group)) {}

  int rank() const override { return group_->rank(); }
  int size() const override { return group_->size(); }
  std::string transport() const override { return "shared_memory"; }

  void all_reduce_sum(at::Tensor& tensor) override {
    detail::check_float32("all_reduce_sum", tensor);
    group_->all_reduce_sum(detail::floats_of(tensor));
  }
  void all_reduce_max(at::Tensor& tensor) override {
    detail::check_float32("all_reduce_max", tensor);
    group_->all_reduce_max(detail::floats_of(tensor));
  }
  void broadcast(at::Tensor& tensor, int root) override {
    detail::check_contiguous("broadcast", tensor);
    detail::check_root(root, size());
    group_->broadcast(detail::bytes_of(tensor), root);
  }
  void all_gather_columns_into(const at::Tensor& shard, std::span<const std::int64_t> widths,
                               at::Tensor& joined) override {
    const std::int64_t total = detail::check_columns(shard, widths, rank(), size());
    detail::shape_result(joined, shard.size(0), total);
    group_->all_gather_columns(shard.const_data_ptr<float>(), shard.size(0), widths,
                               joined.mutable_data_ptr<float>());
  }
  void barrier() override { group_->barrier(); }

 private:
  std::unique_ptr<SharedMemoryGroup> group_;
};

}  // namespace

std::shared_ptr<Communicator> single_process() {
  return std::make_shared<SingleProcess>();
}

std::shared_ptr<Communicator> shared_memory_communicator(std::unique_ptr<SharedMemoryGroup> group) {
  return std::make_shared<SharedMemoryCommunicator>(std::move(group));
}

void check_agreement(Communicator& communicator, const char* what,
                     std::span<const std::int64_t> numbers) {
  if (communicator.size() == 1) {
    return;
  }
  std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a, on whole numbers
  for (const std::int64_t number : numbers) {
    hash = (hash ^ static_cast<std::uint64_t>(number)) * 0x100000001b3U;
    hash ^= hash >> 29;  // a product carries upwards only
  }
  // Pieces that float32 holds exactly, and their negatives: max(x) == -max(-x) if all are equal.
  constexpr int kPieceBits = 22;
  at::Tensor pieces = at::empty({6}, at::kFloat);
  float* const piece = pieces.mutable_data_ptr<float>();
  for (int i = 0; i < 3; ++i) {
    piece[i] = static_cast<float>(hash >> (i * kPieceBits) & ((1U << kPieceBits) - 1));
    piece[i + 3] = -piece[i];
  }
  communicator.all_reduce_max(pieces);
  for (int i = 0; i < 3; ++i) {
    MOQ_CHECK(piece[i] == -piece[i + 3], what, " must be the same on all ", communicator.size(),
              " ranks, got different ones: rank 0 can send its own with Communicator.broadcast");
  }
}

void on_all_ranks(Communicator& communicator, const char* what,
                  const std::function<void()>& action) {
  std::exception_ptr error;
  try {
    action();
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  if (communicator.size() > 1) {
    at::Tensor failed = at::full({1}, error ? 1.0F : 0.0F, at::kFloat);
    communicator.all_reduce_max(failed);
    MOQ_CHECK(error || failed.item<float>() == 0.0F, "engine: ", what,
              " must be made on all ranks, got an error on another one");
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

Transport parse_transport(const std::string& name) {
  if (name == "auto") {
    return Transport::kAuto;
  }
  if (name == "shared_memory") {
    return Transport::kSharedMemory;
  }
  MOQ_CHECK(name == "c10d", "transport must be auto, shared_memory or c10d, got ", name);
  return Transport::kC10d;
}

}  // namespace moq::inference
