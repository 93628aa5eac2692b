#include "inference/parallel/shared_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <set>
#include <string>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

std::set<std::string> names_in_dev_shm() {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    names.insert(entry.path().filename());
  }
  return names;
}

TEST(SharedMemory, ShowsOneProcessWhatAnotherWrote) {
  const SharedMemory memory = SharedMemory::create(100);
  const pid_t child = fork();
  if (child == 0) {
    const SharedMemory opened = SharedMemory::open(memory.address(), 100);
    std::memcpy(opened.data(), "written by the child", 21);
    _exit(0);
  }
  waitpid(child, nullptr, 0);
  EXPECT_STREQ(reinterpret_cast<const char*>(memory.data()), "written by the child");
}

TEST(SharedMemory, StartsZeroed) {
  const SharedMemory memory = SharedMemory::create(5000);
  for (int i = 0; i < 5000; ++i) {
    ASSERT_EQ(memory.data()[i], std::byte{0});
  }
}

TEST(SharedMemory, LeavesNoNameBehindWhenItsCreatorIsKilled) {
  const std::set<std::string> before = names_in_dev_shm();
  const pid_t child = fork();
  if (child == 0) {
    const SharedMemory memory = SharedMemory::create(1 << 20);
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
  EXPECT_EQ(names_in_dev_shm(), before);
}

TEST(SharedMemory, RefusesAnAddressWhoseOwnerHasClosedIt) {
  SharedMemory::Address address;
  { address = SharedMemory::create(100).address(); }
  EXPECT_THROW(SharedMemory::open(address, 100), Error);
}

TEST(SharedMemory, RefusesMemoryOfAnotherSize) {
  const SharedMemory memory = SharedMemory::create(100);
  EXPECT_THROW(SharedMemory::open(memory.address(), 101), Error);
}

TEST(SharedMemory, RefusesMemoryThatHasTheNumbersOfTheAddressButNotItsToken) {
  const SharedMemory memory = SharedMemory::create(100);
  SharedMemory::Address stale = memory.address();
  ++stale.token;
  EXPECT_THROW(SharedMemory::open(stale, 100), Error);
}

TEST(SharedMemory, CannotBeShrunkUnderItsUsers) {
  const SharedMemory memory = SharedMemory::create(100);
  EXPECT_NE(ftruncate(memory.address().descriptor, 0), 0);
}

TEST(SharedMemoryHost, IsTheSameInTwoProcessesOfOneHost) {
  const std::string host = shared_memory_host();
  const pid_t child = fork();
  if (child == 0) {
    _exit(shared_memory_host() == host ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace moq::inference
