#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace moq {

/// Every error that the torch-free code raises. The message has one form:
/// `where: what must hold, got what`.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {
/// Builds the message out of line, so that a check costs its caller one branch and one call.
template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}
}  // namespace detail

}  // namespace moq

/// Throws moq::Error with the streamed message parts unless `condition` holds.
#define MOQ_CHECK(condition, ...)       \
  do {                                  \
    if (!(condition)) [[unlikely]] {    \
      ::moq::detail::fail(__VA_ARGS__); \
    }                                   \
  } while (false)
