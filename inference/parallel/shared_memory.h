#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

/// Memory between the processes of one host. No torch.
namespace moq::inference {

/// Memory that processes of one host map together. It has no name in any file system: it lives as
/// long as a process maps it or holds its descriptor, so that nothing is left behind however they
/// end. Its size is sealed.
class SharedMemory {
 public:
  /// Where processes of the same host, process namespace and user find the memory. Plain data, to
  /// be sent to them.
  struct Address {
    std::int32_t process = 0;
    std::int32_t descriptor = -1;
    std::uint64_t token = 0;  ///< random; tells this memory from another one with the same numbers
  };

  /// New memory of `bytes` bytes (excluding what the class needs), zeroed.
  /// @throws moq::Error if the kernel refuses.
  static SharedMemory create(std::size_t bytes);

  /// Maps the memory at `address`, while its creator holds it.
  /// @throws moq::Error if it can't be opened, or is not the one that the address was made for.
  static SharedMemory open(const Address& address, std::size_t bytes);

  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&&) = delete;
  ~SharedMemory();

  const Address& address() const { return address_; }

  /// The memory, 4096-byte aligned; the same bytes in every process.
  std::byte* data() const;

 private:
  SharedMemory(int descriptor, std::size_t bytes);

  Address address_;
  int descriptor_ = -1;
  std::byte* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
};

/// Names the host as far as shared memory reaches: processes with equal names see each other's
/// processes and memory. Made of the host's name, its boot id and the process namespace.
std::string shared_memory_host();

}  // namespace moq::inference
