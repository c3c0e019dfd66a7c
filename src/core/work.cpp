#include "core/work.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace flash_attn {
namespace {

struct Counts {
  double pairs = 0, rows = 0, keys = 0;  // visible pairs, rows of queries, keys that somebody sees; of one head
};

/// Rows of more than 2^16 are counted by as many samples, each for the rows around it.
void count(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k, double times, Counts& counts) {
  counts.rows += times * static_cast<double>(seqlen_q);
  if (seqlen_q <= 0 || seqlen_k <= 0) return;
  const int64_t step = std::max<int64_t>(1, seqlen_q >> 16);
  double pairs = 0;
  for (int64_t i = 0; i < seqlen_q; i += step) {
    const int64_t rows = std::min(step, seqlen_q - i);
    const Interval seen = mask.row(i + rows / 2, seqlen_q, seqlen_k);
    pairs += static_cast<double>(seen.hi - seen.lo) * static_cast<double>(rows);
  }
  const int64_t first = mask.row(0, seqlen_q, seqlen_k).lo, last = mask.row(seqlen_q - 1, seqlen_q, seqlen_k).hi;
  counts.pairs += times * pairs;
  counts.keys += times * static_cast<double>(std::max<int64_t>(0, last - first));
}

double elements_of_bias(const ScorePipeline& s) {
  return static_cast<double>(s.bias_shape[0]) * static_cast<double>(s.bias_shape[1]) *
         static_cast<double>(s.bias_shape[2]) * static_cast<double>(s.bias_shape[3]);
}

std::string with_unit(double x, const char* unit) {
  constexpr const char* kPrefixes[] = {"", "k", "M", "G", "T", "P", "E"};
  int i = 0;
  for (; x >= 999.5 && i < 6; ++i) x /= 1000;
  char text[48];
  const int decimals = x >= 100 || i == 0 ? 0 : x >= 10 ? 1 : 2;
  std::snprintf(text, sizeof text, "%.*f %s%s", decimals, x, kPrefixes[i], unit);
  return text;
}

}  // namespace

Work count_work(const Problem& p) {
  const SequenceTable& t = p.sequences;
  const bool tables = t.cu_seqlens_q || t.cu_seqlens_k || t.seqused_q || t.seqused_k || t.leftpad_k || t.cu_seqlens_new;
  Counts counts;
  Work work;
  if (tables && p.device.is_cpu()) {
    for (int64_t b = 0; b < t.batch; ++b) {
      const Sequence s = t.at(b);
      count(p.scores.mask, s.seqlen_q, s.seqlen_k, 1, counts);
    }
  } else {
    work.bound = tables;
    count(p.scores.mask, p.max_seqlen_q, p.max_seqlen_k, static_cast<double>(p.batch), counts);
  }
  const bool backward = p.pass == Pass::backward;
  const double d = static_cast<double>(p.headdim), dv = static_cast<double>(p.headdim_v);
  const double nheads = static_cast<double>(p.nheads), nheads_k = static_cast<double>(p.nheads_k);
  const double size = static_cast<double>(size_of(p.dtype));
  const double rows = counts.rows * nheads, keys = counts.keys * nheads_k;
  work.flops = 2 * nheads * counts.pairs * (backward ? 3 * d + 2 * dv : d + dv);
  // Forward: q and out, k and v. Backward: q and dq, out and dout, k and dk, v and dv; lse.
  work.bytes = size * (backward ? 2 * (rows + keys) * (d + dv) : (rows + keys) * (d + dv));
  if (p.lse.present()) work.bytes += 4 * rows;
  if (p.scores.bias.present()) {
    const double elements = elements_of_bias(p.scores);
    work.bytes += elements * static_cast<double>(size_of(p.scores.bias.dtype));
    if (p.dbias.present()) work.bytes += elements * 4;
  }
  if (p.append.rows > 0) {  // new keys are read, and written to the cache
    const double joining = static_cast<double>(p.batch * p.append.max_rows) * nheads_k;
    work.bytes += 2 * size * joining * (d + dv);
  }
  return work;
}

std::string describe(const Work& work) {
  std::string text = work.bound ? "at most " : "";
  text += with_unit(work.flops, "FLOP") + ", " + with_unit(work.bytes, "B");
  if (work.bytes > 0) text += ": " + with_unit(work.flops / work.bytes, "FLOP") + " a byte";
  return text;
}

}  // namespace flash_attn
