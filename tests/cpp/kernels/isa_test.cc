#include "kernels/cpu/isa.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels/common/check.h"

namespace moq::kernels::cpu {
namespace {

// The variable is read once per process, so each question is asked of a fresh one.
[[noreturn]] void print_active_isa(const char* variable) {
  setenv("MOQ_CPU_ISA", variable, 1);
  try {
    std::fprintf(stderr, "runs %s", name_of(active_isa()));
  } catch (const Error& error) {
    std::fprintf(stderr, "%s", error.what());
  }
  std::exit(0);
}

class IsaTest : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(IsaTest, EveryInstructionSetHasAName) {
  EXPECT_STREQ(name_of(Isa::kScalar), "scalar");
  EXPECT_STREQ(name_of(Isa::kAvx2), "avx2");
  EXPECT_STREQ(name_of(Isa::kAvx512), "avx512");
}

TEST_F(IsaTest, TheVariableChoosesAWeakerInstructionSet) {
  EXPECT_EXIT(print_active_isa("scalar"), testing::ExitedWithCode(0), "runs scalar");
}

TEST_F(IsaTest, AnEmptyVariableMeansTheBestOfTheProcessor) {
  EXPECT_EXIT(print_active_isa(""), testing::ExitedWithCode(0), "runs (scalar|avx2|avx512)");
}

TEST_F(IsaTest, AnUnknownNameIsAnErrorThatListsTheKnownOnes) {
  EXPECT_EXIT(print_active_isa("sse9"), testing::ExitedWithCode(0),
              "MOQ_CPU_ISA: must be scalar, avx2 or avx512, got sse9");
}

#if defined(__x86_64__)
TEST_F(IsaTest, MoreThanTheProcessorHasIsAnError) {
  if (__builtin_cpu_supports("avx512vnni")) {
    GTEST_SKIP() << "this processor has every instruction set that the kernels know";
  }
  EXPECT_EXIT(print_active_isa("avx512"), testing::ExitedWithCode(0),
              "MOQ_CPU_ISA: this processor supports up to");
}
#endif

}  // namespace
}  // namespace moq::kernels::cpu
