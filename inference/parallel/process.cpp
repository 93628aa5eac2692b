#include "inference/parallel/process.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <optional>
#include <sstream>
#include <string>

namespace moq::inference {
namespace {

/// Fields of /proc/<id>/stat, as in proc(5).
struct Status {
  char state = 'X';  ///< Z: ended, its parent has not taken note; X: gone
  std::uint64_t start_time = 0;
};

/// The status of process `id`, that of a gone one if there is none; nothing if the system doesn't
/// tell.
std::optional<Status> read_status(std::int32_t id) {
  const int file = open(("/proc/" + std::to_string(id) + "/stat").c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    return errno == ENOENT ? std::optional(Status{}) : std::nullopt;
  }
  std::array<char, 1024> buffer{};
  const ssize_t length = read(file, buffer.data(), buffer.size());
  const int read_error = errno;
  close(file);
  if (length <= 0) {  // the process may end between the two calls
    return length < 0 && read_error == ESRCH ? std::optional(Status{}) : std::nullopt;
  }
  // The second field, the command in parentheses, may contain anything; the others follow its last
  // parenthesis.
  const std::string text(buffer.data(), static_cast<std::size_t>(length));
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  Status status;
  fields >> status.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) {
    fields >> skipped;
  }
  fields >> status.start_time;
  return fields ? std::optional(status) : std::nullopt;
}

}  // namespace

Process this_process() {
  const std::int32_t id = getpid();
  return {id, read_status(id).value_or(Status{}).start_time};
}

bool is_alive(const Process& process) {
  const std::optional<Status> status = read_status(process.id);
  return !status ||
         (status->state != 'Z' && status->state != 'X' && status->start_time == process.start_time);
}

}  // namespace moq::inference
