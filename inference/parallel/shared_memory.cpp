#include "inference/parallel/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

/// The first page of the mapping holds the token, so that data() starts on a page of its own.
constexpr std::size_t kPrefixBytes = 4096;

std::string last_error() {
  return std::strerror(errno);
}

std::uint64_t random_token() {
  std::uint64_t token = 0;
  MOQ_CHECK(getrandom(&token, sizeof(token), 0) == sizeof(token),
            "shared memory: getrandom must succeed, got ", last_error());
  return token;
}

}  // namespace

SharedMemory::SharedMemory(int descriptor, std::size_t bytes)
    : descriptor_(descriptor), mapping_bytes_(kPrefixBytes + bytes) {
  void* const mapping =
      mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
  if (mapping == MAP_FAILED) {
    const std::string reason = last_error();
    close(descriptor_);
    detail::fail("shared memory: mapping ", mapping_bytes_, " bytes must succeed, got ", reason);
  }
  mapping_ = static_cast<std::byte*>(mapping);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : address_(other.address_),
      descriptor_(std::exchange(other.descriptor_, -1)),
      mapping_(std::exchange(other.mapping_, nullptr)),
      mapping_bytes_(other.mapping_bytes_) {}

SharedMemory::~SharedMemory() {
  if (mapping_ != nullptr) {
    munmap(mapping_, mapping_bytes_);
    close(descriptor_);
  }
}

SharedMemory SharedMemory::create(std::size_t bytes) {
  const int descriptor = memfd_create("moq", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  MOQ_CHECK(descriptor >= 0, "shared memory: memfd_create must succeed, got ", last_error());
  // Sealed, because a peer that could shrink the file could kill every other rank with SIGBUS.
  if (ftruncate(descriptor, static_cast<off_t>(kPrefixBytes + bytes)) != 0 ||
      fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const std::string reason = last_error();
    close(descriptor);
    detail::fail("shared memory: ", kPrefixBytes + bytes, " bytes must be available, got ", reason);
  }
  SharedMemory memory(descriptor, bytes);
  memory.address_ = {.process = getpid(), .descriptor = descriptor, .token = random_token()};
  std::memcpy(memory.mapping_, &memory.address_.token, sizeof(memory.address_.token));
  return memory;
}

SharedMemory SharedMemory::open(const Address& address, std::size_t bytes) {
  const std::string path =
      "/proc/" + std::to_string(address.process) + "/fd/" + std::to_string(address.descriptor);
  const int descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  MOQ_CHECK(descriptor >= 0, "shared memory: ", path, " must be open to this process, got ",
            last_error());
  struct stat status {};
  if (fstat(descriptor, &status) != 0 ||
      status.st_size != static_cast<off_t>(kPrefixBytes + bytes)) {
    close(descriptor);
    detail::fail("shared memory: ", path, " must have ", kPrefixBytes + bytes, " bytes, got ",
                 status.st_size);
  }
  SharedMemory memory(descriptor, bytes);
  memory.address_ = address;
  MOQ_CHECK(std::memcmp(memory.mapping_, &address.token, sizeof(address.token)) == 0,
            "shared memory: ", path, " must carry the token of its address, got another one");
  return memory;
}

std::byte* SharedMemory::data() const {
  return mapping_ + kPrefixBytes;
}

std::string shared_memory_host() {
  std::array<char, 256> host_name{};
  gethostname(host_name.data(), host_name.size() - 1);
  std::string boot_id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot_id;
  std::array<char, 256> process_namespace{};
  const ssize_t length =
      readlink("/proc/self/ns/pid", process_namespace.data(), process_namespace.size() - 1);
  return std::string(host_name.data()) + ' ' + boot_id + ' ' +
         std::string(process_namespace.data(), length > 0 ? static_cast<std::size_t>(length) : 0);
}

}  // namespace moq::inference
