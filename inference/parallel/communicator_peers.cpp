#include "inference/parallel/communicator_peers.h"

#include <chrono>
#include <exception>
#include <string_view>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "inference/parallel/shared_memory.h"

namespace moq::inference {
namespace {

using Clock = std::chrono::steady_clock;

/// A process ends some milliseconds after its connections broke, and a rank that learns of the
/// failure only from its neighbour's giving up answers later.
constexpr std::chrono::seconds kLongestSearch(5);
constexpr std::chrono::milliseconds kBetweenLooks(20);

constexpr const char* kVerdictKey = "moq/missing";

std::string answer_key(int rank) {
  return "moq/answer/" + std::to_string(rank);
}

std::string describe(std::span<const int> ranks, std::span<const Peer> peers,
                     std::string_view what) {
  std::string text;
  for (const int rank : ranks) {
    text += (text.empty() ? "rank " : " and no rank ") + std::to_string(rank) + " (process " +
            std::to_string(peers[static_cast<std::size_t>(rank)].process.id) + ")";
  }
  return text + " of " + std::to_string(peers.size()) + ": " + std::string(what);
}

/// Ranks of this host whose processes have ended.
std::vector<int> ended_ranks(int own_rank, std::span<const Peer> peers) {
  const Peer& own = peers[static_cast<std::size_t>(own_rank)];
  std::vector<int> ended;
  for (int rank = 0; rank < static_cast<int>(peers.size()); ++rank) {
    const Peer& peer = peers[static_cast<std::size_t>(rank)];
    if (rank != own_rank && peer.host == own.host && !is_alive(peer.process)) {
      ended.push_back(rank);
    }
  }
  return ended;
}

/// The store of a group. It may have ended with the process that kept it: then nobody answers.
class Board {
 public:
  explicit Board(c10d::ProcessGroup& group) : store_(group.getStore()) {
    if (store_) {
      timeout_ = store_->getTimeout();
      store_->setTimeout(kLongestSearch);
    }
  }
  ~Board() {
    if (store_) {
      store_->setTimeout(timeout_);
    }
  }
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  void write(const std::string& key) {
    attempt([&] { store_->set(key, std::string("1")); });
  }
  bool has(const std::string& key) {
    bool found = false;
    attempt([&] { found = store_->check({key}); });
    return found;
  }
  /// What the first rank has written under the key: `text`, if that is this one.
  std::string agree(const std::string& key, const std::string& text) {
    std::string agreed = text;
    attempt([&] { agreed = store_->compareSet(key, "", text); });
    return agreed;
  }

 private:
  template <typename Call>
  void attempt(Call call) {
    if (!store_) {
      return;
    }
    try {
      call();
    } catch (const std::exception&) {
      store_.reset();
    }
  }

  c10::intrusive_ptr<c10d::Store> store_;
  std::chrono::milliseconds timeout_{0};
};

}  // namespace

Peer this_peer() {
  Peer peer{.process = this_process()};
  shared_memory_host().copy(peer.host.data(), peer.host.size() - 1);
  return peer;
}

std::string find_missing_ranks(c10d::ProcessGroup& group, std::span<const Peer> peers) {
  Board board(group);
  board.write(answer_key(group.getRank()));
  const Clock::time_point deadline = Clock::now() + kLongestSearch;
  while (true) {
    if (board.has(kVerdictKey)) {
      return board.agree(kVerdictKey, "");
    }
    if (const std::vector<int> ended = ended_ranks(group.getRank(), peers); !ended.empty()) {
      return board.agree(kVerdictKey, describe(ended, peers, "its process has ended"));
    }
    std::vector<int> silent;
    for (int rank = 0; rank < group.getSize(); ++rank) {
      if (rank != group.getRank() && !board.has(answer_key(rank))) {
        silent.push_back(rank);
      }
    }
    if (silent.empty()) {
      return "";
    }
    if (Clock::now() >= deadline) {
      return board.agree(kVerdictKey, describe(silent, peers, "it gives no answer"));
    }
    std::this_thread::sleep_for(kBetweenLooks);
  }
}

}  // namespace moq::inference
