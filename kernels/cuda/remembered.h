#pragma once

#include <map>
#include <mutex>

namespace moq::kernels::cuda {

/// make(), once in the process for each key. Every caller's Make, a lambda, has keys of its own.
template <typename Key, typename Make>
const auto& remembered(const Key& key, const Make& make) {
  static std::mutex mutex;
  static std::map<Key, decltype(make())> known;
  const std::scoped_lock lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, make()).first->second;
}

}  // namespace moq::kernels::cuda
