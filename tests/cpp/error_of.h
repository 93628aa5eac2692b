#pragma once

#include <string>

#include "kernels/common/check.h"

namespace moq::test {

/// What the moq::Error says that `action` throws; "no error" if it throws none.
template <typename Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace moq::test
