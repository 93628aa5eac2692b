#include "inference/parallel/process.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

namespace moq::inference {
namespace {

TEST(IsAlive, HoldsForTheCallingProcess) {
  EXPECT_TRUE(is_alive(this_process()));
}

TEST(IsAlive, EndsWithTheProcessBeforeAndAfterItsParentTakesNote) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    const Process self = this_process();
    (void)!write(ends[1], &self, sizeof(self));
    pause();
  }
  Process process;
  ASSERT_EQ(read(ends[0], &process, sizeof(process)), static_cast<ssize_t>(sizeof(process)));
  EXPECT_TRUE(is_alive(process));
  kill(child, SIGKILL);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  EXPECT_FALSE(is_alive(process));
  waitpid(child, nullptr, 0);
  EXPECT_FALSE(is_alive(process));
}

TEST(IsAlive, TellsALaterProcessWithTheSameNumber) {
  Process earlier = this_process();
  --earlier.start_time;
  EXPECT_FALSE(is_alive(earlier));
}

}  // namespace
}  // namespace moq::inference
