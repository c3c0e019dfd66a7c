// The kernels one by one: rows in and out of every dtype, packing, and never a byte beyond a row.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "core/half.hpp"
#include "cpu/isa.hpp"

namespace flash_attn::test {
namespace {

class EveryIsa : public ::testing::TestWithParam<const cpu::Kernels*> {};

TEST_P(EveryIsa, WidensEvery16BitPatternExactly) {
  const cpu::Kernels& k = *GetParam();
  std::vector<uint16_t> bits(65536);
  for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
  const char* row = reinterpret_cast<const char*>(bits.data());
  std::vector<float> wide(65536);
  for (DType dtype : {DType::f16, DType::bf16}) {
    k.attend_any->pack_q({&row, 1, 65536, 1, dtype}, 1.0f, reinterpret_cast<char*>(wide.data()));
    for (int i = 0; i < 65536; ++i) {
      const float want = dtype == DType::f16 ? f16_to_float(bits[i]) : bf16_to_float(bits[i]);
      if (std::isnan(want))
        EXPECT_TRUE(std::isnan(wide[i])) << i;
      else
        EXPECT_EQ(wide[i], want) << i;
    }
  }
}

TEST_P(EveryIsa, NarrowsToNearestEven) {
  const cpu::Kernels& k = *GetParam();
  // Every 16-bit value, the midpoints to the next, and a float on either side of each.
  for (DType dtype : {DType::f16, DType::bf16}) {
    std::vector<float> x;
    for (uint32_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      const float a = dtype == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
      const float b = dtype == DType::f16 ? f16_to_float(static_cast<uint16_t>(i + 1))
                                          : bf16_to_float(static_cast<uint16_t>(i + 1));
      const float middle = a + (b - a) / 2;
      for (float y : {a, middle, std::nextafter(middle, a), std::nextafter(middle, b)}) x.push_back(y);
    }
    std::vector<uint16_t> out(x.size());
    const char* row = reinterpret_cast<const char*>(out.data());
    const float one = 1.0f;
    const auto n = static_cast<int64_t>(x.size());
    k.store_rows({&row, 1, n, 1, dtype}, &one, x.data(), n);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const uint16_t want = dtype == DType::f16 ? f16_from_float(x[i]) : bf16_from_float(x[i]);
      if (std::isnan(x[i]))
        EXPECT_TRUE(std::isnan(dtype == DType::f16 ? f16_to_float(out[i]) : bf16_to_float(out[i])));
      else
        EXPECT_EQ(out[i], want) << x[i];
    }
  }
}

TEST_P(EveryIsa, PanelsAndStripsHoldTheRows) {
  const cpu::AttendKernel& kernel = *GetParam()->attend_any;
  const int64_t width = GetParam()->width, panel_rows = kernel.panel;
  for (int64_t cols : {1, 5, 16, 40, 64, 100}) {
    const int64_t n = panel_rows - 3, cols_padded = (cols + width - 1) / width * width;
    std::vector<float> x(static_cast<std::size_t>(n * cols));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i + 1);
    std::vector<const char*> rows(static_cast<std::size_t>(panel_rows), nullptr);
    for (int64_t r = 0; r < n; ++r) rows[r] = reinterpret_cast<const char*>(&x[r * cols]);
    std::vector<float> panels(static_cast<std::size_t>(2 * panel_rows * cols), -1),
        strips(2 * panel_rows * cols_padded, -1);
    const auto pack = [&](auto kernel_pack, std::vector<float>& to, int64_t first) {
      return kernel_pack({rows.data(), panel_rows, cols, 1, DType::f32}, reinterpret_cast<char*>(to.data()),
                         2 * panel_rows, first);
    };
    EXPECT_FALSE(pack(kernel.pack_k, panels, panel_rows));
    EXPECT_FALSE(pack(kernel.pack_v, strips, panel_rows));
    for (int64_t r = 0; r < panel_rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const float want = r < n ? x[r * cols + c] : 0.0f;
        EXPECT_EQ(panels[(cols + c) * panel_rows + r], want);
        const int64_t strip = c / panel_rows * panel_rows, strip_width = std::min(panel_rows, cols_padded - strip);
        EXPECT_EQ(strips[strip * 2 * panel_rows + (panel_rows + r) * strip_width + c - strip], want);
      }
    x[static_cast<std::size_t>(n * cols) - 1] = NAN;
    EXPECT_TRUE(pack(kernel.pack_k, panels, 0));
    x[static_cast<std::size_t>(n * cols) - 1] = -INFINITY;
    EXPECT_TRUE(pack(kernel.pack_v, strips, 0));
  }
}

TEST_P(EveryIsa, NothingBeyondARowIsTouched) {
  const cpu::Kernels& k = *GetParam();
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  char* const memory =
      static_cast<char*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(memory + page, page, PROT_NONE), 0);  // reading or writing here ends the test
  const cpu::AttendKernel& kernel = *k.attend_any;
  std::vector<float> wide(4096), packed(static_cast<std::size_t>(kernel.panel * 128));
  char* const pack = reinterpret_cast<char*>(packed.data());
  const float one = 1.0f;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (int64_t cols = 1; cols <= 100; ++cols) {
      const char* const row = memory + page - static_cast<std::size_t>(cols) * size_of(dtype);
      const cpu::RowList rows{&row, 1, cols, 1, dtype};
      kernel.pack_q(rows, 1.0f, pack);
      kernel.pack_k(rows, pack, kernel.panel, 0);
      kernel.pack_v(rows, pack, 1, 0);
      k.dot_rows(rows, rows, wide.data());
      k.store_rows(rows, &one, wide.data(), 128);
    }
  }
  munmap(memory, 2 * page);
}

INSTANTIATE_TEST_SUITE_P(Cpu, EveryIsa, ::testing::ValuesIn(cpu::usable_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace flash_attn::test
