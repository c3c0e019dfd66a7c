// Every structured mask is one interval per row.
//
//   Query row i of a sequence stands at key position p = i + seqlen_k - seqlen_q (bottom-right alignment) and sees the
//   keys [lo(i), hi(i)). Causal, sliding windows and chunks are intersections of intervals, and lo and hi never
//   decrease with i: a tile of rows [i0, i1) sees at most [lo(i0), hi(i1-1)), and sees all of [lo(i1-1), hi(i0)).
#pragma once

#include <algorithm>
#include <cstdint>

namespace flash_attn {

struct Interval {
  int64_t lo, hi;  // [lo, hi); empty if hi <= lo
  bool empty() const { return hi <= lo; }
};

struct Mask {
  int64_t window_left = -1;   // -1: no limit
  int64_t window_right = -1;  // -1: no limit; causal is window_right == 0
  int64_t chunk = 0;          // 0: off

  bool trivial() const { return window_left < 0 && window_right < 0 && chunk == 0; }

  /// Keys that query row `i` sees. seqlen_k <= 0 or seqlen_q <= 0: nothing.
  Interval row(int64_t i, int64_t seqlen_q, int64_t seqlen_k) const {
    const int64_t p = i + seqlen_k - seqlen_q;
    int64_t lo = 0, hi = seqlen_k;
    if (window_left >= 0) lo = std::max(lo, p - window_left);
    if (window_right >= 0) hi = std::min(hi, p + window_right + 1);
    if (chunk > 0) {
      const int64_t first = floor_div(p, chunk) * chunk;
      lo = std::max(lo, first);
      hi = std::min(hi, first + chunk);
    }
    lo = std::min(lo, seqlen_k);  // rows that see nothing keep lo and hi monotone and inside [0, seqlen_k]
    return {lo, std::max(hi, lo)};
  }

 private:
  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
};

}  // namespace flash_attn
