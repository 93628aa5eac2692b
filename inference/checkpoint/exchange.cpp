#include "inference/checkpoint/exchange.h"

#include <fcntl.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "kernels/common/check.h"

namespace moq::checkpoint {

bool exchange_paths(const std::filesystem::path& first, const std::filesystem::path& second) {
  if (::renameat2(AT_FDCWD, first.c_str(), AT_FDCWD, second.c_str(), RENAME_EXCHANGE) == 0) {
    return true;
  }
  const int error = errno;
  // EINVAL is how a file system says that it does not know the flag.
  MOQ_CHECK(error == EINVAL || error == ENOSYS || error == EOPNOTSUPP, "exchange of ",
            first.string(), " and ", second.string(), ": ", std::strerror(error));
  return false;
}

}  // namespace moq::checkpoint
