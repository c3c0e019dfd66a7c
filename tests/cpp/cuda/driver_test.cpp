// The driver that is found at run time: one that is not there, and one that notes what it is asked for.
#include "cuda/driver/driver.hpp"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include "cuda/fake_libcuda.hpp"

namespace flash_attn::test {
namespace {

FakeCuda& fake() {
  void* const library = dlopen(FAKE_LIBCUDA, RTLD_LAZY | RTLD_LOCAL);
  return *reinterpret_cast<FakeCuda* (*)()>(dlsym(library, "fake_cuda"))();
}

TEST(DriverTest, MayBeAbsent) {
  for (const char* library : {"libno-such-driver.so.1", "libm.so.6"}) {
    const cuda::Driver driver(library);
    EXPECT_FALSE(driver.loaded());
    EXPECT_EQ(driver.context(), nullptr);
  }
}

TEST(DriverTest, LaunchesWhatItIsGiven) {
  const cuda::Driver driver(FAKE_LIBCUDA);
  ASSERT_TRUE(driver.loaded());
  FakeCuda& seen = fake();
  int there = 0;
  seen.context = &there;
  EXPECT_EQ(driver.context(), &there);
  for (const int n : {3, 300}) {  // few, and more than usual
    Launch kernel{.function = 77, .programs = 1000000, .threads = 128, .shared_bytes = 4096};
    kernel.parameters.resize(n);
    std::vector<uint64_t> values(n);
    for (int i = 0; i < n; ++i) values[i] = 10 + i;
    seen.parameters = n;
    driver.launch(kernel, values.data(), &there);
    EXPECT_EQ(seen.function, reinterpret_cast<void*>(77));
    EXPECT_EQ(seen.stream, &there);
    EXPECT_EQ(seen.extra, nullptr);
    EXPECT_EQ((std::vector<unsigned>(seen.sizes, seen.sizes + 7)),
              (std::vector<unsigned>{1000000, 1, 1, 128, 1, 1, 4096}));
    EXPECT_EQ((std::vector<uint64_t>(seen.values, seen.values + n)), values);
  }
}

TEST(DriverTest, FailuresHaveTheDriversWords) {
  const cuda::Driver driver(FAKE_LIBCUDA);
  FakeCuda& seen = fake();
  seen.result = 700;
  try {
    driver.launch({.function = 1}, nullptr, nullptr);
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::device_failure);
    EXPECT_STREQ(e.what(), "CUDA: CUDA_ERROR_TOY (700), a toy broke");
  }
  int there = 0;
  seen.context = &there;
  EXPECT_EQ(driver.context(), nullptr) << "a driver that fails has no context";
  seen = {};
}

}  // namespace
}  // namespace flash_attn::test
