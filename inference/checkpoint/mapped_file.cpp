#include "inference/checkpoint/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

/// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) {
      ::close(number_);
    }
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

/// Size of an open regular file.
std::size_t regular_file_size(const Descriptor& file, const std::filesystem::path& path) {
  struct stat status {};
  MOQ_CHECK(::fstat(file.number(), &status) == 0, path.string(), ": ", std::strerror(errno));
  MOQ_CHECK(S_ISREG(status.st_mode), path.string(), ": expected a regular file");
  return static_cast<std::size_t>(status.st_size);
}

/// O_NONBLOCK: opening a pipe that somebody put in place of a file must not wait for a writer.
int open_for_reading(const std::filesystem::path& path) {
  const int number = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  MOQ_CHECK(number >= 0, path.string(), ": ", std::strerror(errno));
  return number;
}

}  // namespace

MappedFile MappedFile::open(const std::filesystem::path& path) {
  const Descriptor file(open_for_reading(path));
  const std::size_t size = regular_file_size(file, path);
  if (size == 0) {
    return {nullptr, 0};  // mmap refuses a length of 0
  }
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number(), 0);
  MOQ_CHECK(data != MAP_FAILED, path.string(), ": mapping ", size,
            " bytes: ", std::strerror(errno));
  return {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    ::munmap(const_cast<std::byte*>(data_), size_);
  }
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  const MappedFile file = MappedFile::open(path);
  MOQ_CHECK(file.bytes().size() <= max_bytes, path.string(), ": expected at most ", max_bytes,
            " bytes, got ", file.bytes().size());
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace moq::checkpoint
