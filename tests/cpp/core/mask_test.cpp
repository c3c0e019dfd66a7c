// The interval of a row against the definition of each mask, key by key.
#include "core/mask.hpp"

#include <gtest/gtest.h>

namespace flash_attn {
namespace {

int64_t chunk_of(int64_t position, int64_t chunk) {
  int64_t index = 0;
  while (position < 0) position += chunk, --index;
  return index + position / chunk;
}

bool sees(const Mask& m, int64_t i, int64_t j, int64_t seqlen_q, int64_t seqlen_k) {
  const int64_t p = i + seqlen_k - seqlen_q;
  if (m.window_left >= 0 && j < p - m.window_left) return false;
  if (m.window_right >= 0 && j > p + m.window_right) return false;
  if (m.chunk > 0 && chunk_of(p, m.chunk) != chunk_of(j, m.chunk)) return false;
  return true;
}

TEST(Mask, IntervalIsTheDefinition) {
  for (int64_t sq = 1; sq <= 7; ++sq)
    for (int64_t sk = 0; sk <= 7; ++sk)
      for (int64_t left : {-1, 0, 1, 3, 9})
        for (int64_t right : {-1, 0, 1, 4, 9})
          for (int64_t chunk : {0, 1, 2, 3, 8}) {
            const Mask m{left, right, chunk};
            Interval before{0, 0};
            for (int64_t i = 0; i < sq; ++i) {
              const Interval row = m.row(i, sq, sk);
              ASSERT_LE(0, row.lo);
              ASSERT_LE(row.lo, row.hi);
              ASSERT_LE(row.hi, sk);
              ASSERT_LE(before.lo, row.lo) << "lo decreases";
              ASSERT_LE(before.hi, row.hi) << "hi decreases";
              for (int64_t j = 0; j < sk; ++j)
                ASSERT_EQ(sees(m, i, j, sq, sk), row.lo <= j && j < row.hi)
                    << "row " << i << " of " << sq << ", key " << j << " of " << sk << ", window (" << left << ", "
                    << right << "), chunk " << chunk;
              before = row;
            }
          }
}

TEST(Mask, FarWindowsDoNotOverflow) {
  const Mask m{int64_t{1} << 40, int64_t{1} << 40, int64_t{1} << 40};
  const Interval row = m.row(0, 1, 5);
  EXPECT_EQ(row.lo, 0);
  EXPECT_EQ(row.hi, 5);
}

}  // namespace
}  // namespace flash_attn
