#include "plain.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/append.hpp"
#include "core/dropout.hpp"
#include "dtype.hpp"

namespace flash_attn::cli {
namespace {

float load(const char* address, DType t) {
  switch (t) {
    case DType::f16: return f16_to_float(*reinterpret_cast<const uint16_t*>(address));
    case DType::bf16: return bf16_to_float(*reinterpret_cast<const uint16_t*>(address));
    case DType::f64: return static_cast<float>(*reinterpret_cast<const double*>(address));
    default: return *reinterpret_cast<const float*>(address);
  }
}

void store(char* address, DType t, float x) {
  switch (t) {
    case DType::f16: *reinterpret_cast<uint16_t*>(address) = f16_from_float(x); break;
    case DType::bf16: *reinterpret_cast<uint16_t*>(address) = bf16_from_float(x); break;
    case DType::f64: *reinterpret_cast<double*>(address) = x; break;
    default: *reinterpret_cast<float*>(address) = x;
  }
}

/// A dense (rows, cols) block of floats.
struct Block {
  int64_t rows, cols;
  std::vector<float> x;
  Block(int64_t r, int64_t c) : rows(r), cols(c), x(static_cast<std::size_t>(r * c), 0.0f) {}
  float* operator[](int64_t i) { return x.data() + i * cols; }
  const float* operator[](int64_t i) const { return x.data() + i * cols; }
};

char* element(const Operand& t, int64_t b, int64_t i, int64_t h, int64_t d) {
  return t.at(b, i, h) + d * t.stride_col * static_cast<int64_t>(size_of(t.dtype));
}

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

/// Rows of a batch entry's head. Keys may lie on pages.
Block load_q(const Operand& t, const Sequence& s, int64_t h, int64_t cols) {
  Block x(s.seqlen_q, cols);
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t d = 0; d < cols; ++d) x[i][d] = load(element(t, s.q_batch, s.q_row + i, h, d), t.dtype);
  }
  return x;
}

Block load_k(const Operand& t, const Sequence& s, int64_t page_size, int64_t h, int64_t cols) {
  Block x(s.seqlen_k, cols);
  for (int64_t j = 0; j < x.rows; ++j) {
    const int64_t key = s.k_row + j;
    const int64_t b = s.pages ? s.pages[key / page_size] : s.k_batch, row = s.pages ? key % page_size : key;
    for (int64_t d = 0; d < cols; ++d) x[j][d] = load(element(t, b, row, h, d), t.dtype);
  }
  return x;
}

/// One head of one sequence: its operands and the two matrices that the plain arithmetic keeps whole.
struct Head {
  const Problem& problem;
  int64_t b, h, hk;
  Sequence s;
  Block q, k, v;
  Block x;       // scores, as softmax sees them
  Block p;       // probabilities, before dropout
  Block capped;  // tanh of the softcap
  std::vector<float> lse;
  float sink_probability(int64_t i) const {
    return problem.scores.sink.present() ? std::exp(sink() - lse[static_cast<std::size_t>(i)]) : 0.0f;
  }
  float sink() const { return load(problem.scores.sink.at(0, 0, h), problem.scores.sink.dtype); }

  Head(const Problem& pr, int64_t batch, int64_t head)
      : problem(pr),
        b(batch),
        h(head),
        hk(head / pr.group()),
        s(pr.sequences.at(batch)),
        q(load_q(pr.q, s, h, pr.headdim)),
        k(load_k(pr.k, s, pr.sequences.page_size, hk, pr.headdim)),
        v(load_k(pr.v, s, pr.sequences.page_size, hk, pr.headdim_v)),
        x(s.seqlen_q, s.seqlen_k),
        p(s.seqlen_q, s.seqlen_k),
        capped(s.seqlen_q, s.seqlen_k),
        lse(static_cast<std::size_t>(s.seqlen_q)) {
    const ScorePipeline& sp = pr.scores;
    const float scale = static_cast<float>(sp.scale), cap = static_cast<float>(sp.softcap),
                slope = sp.alibi_slope(b, h);
    for (int64_t i = 0; i < s.seqlen_q; ++i) {
      const Interval keys = sp.mask.row(i, s.seqlen_q, s.seqlen_k);
      const int64_t position = i + s.seqlen_k - s.seqlen_q;
      float m = sp.sink.present() ? sink() : -INFINITY;
      for (int64_t j = keys.lo; j < keys.hi; ++j) {
        float score = scale * dot(q[i], k[j], pr.headdim);
        if (cap > 0) capped[i][j] = std::tanh(score / cap), score = cap * capped[i][j];
        if (sp.alibi) score -= slope * static_cast<float>(std::abs(position - j));
        if (sp.bias.present()) score += load(element(sp.bias, b, i, h, j), sp.bias.dtype);
        x[i][j] = score;
        m = std::max(m, score);
      }
      float sum = sp.sink.present() ? std::exp(sink() - m) : 0.0f;
      for (int64_t j = keys.lo; j < keys.hi; ++j) sum += p[i][j] = std::exp(x[i][j] - m);
      for (int64_t j = keys.lo; j < keys.hi; ++j) p[i][j] /= sum;
      lse[static_cast<std::size_t>(i)] = sum > 0 ? m + std::log(sum) : -INFINITY;
    }
  }

  /// Row i of p again, from its lse.
  void recompute(int64_t i, float row_lse) {
    const Interval keys = problem.scores.mask.row(i, s.seqlen_q, s.seqlen_k);
    for (int64_t j = keys.lo; j < keys.hi; ++j) p[i][j] = std::exp(x[i][j] - row_lse);
    lse[static_cast<std::size_t>(i)] = row_lse;
  }

  /// What dropout makes of entry (i, j): 0, or the factor of what is kept.
  float kept(const DropoutRule& rule, int64_t i, int64_t j) const {
    if (!rule.active()) return 1.0f;
    return rule.keep(b * problem.nheads + h, i, j) ? rule.scale : 0.0f;
  }
};

/// Rows of no sequence are zero: clear all, before the sequences are written.
void clear(const Operand& t, int64_t batch, int64_t rows, int64_t heads, int64_t cols, float value = 0.0f) {
  if (!t.present()) return;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < cols; ++d) store(element(t, b, i, h, d), t.dtype, value);
      }
    }
  }
}

void store_rows(const Operand& t, int64_t batch, int64_t first, int64_t h, const Block& x) {
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t d = 0; d < x.cols; ++d) store(element(t, batch, first + i, h, d), t.dtype, x[i][d]);
  }
}

void plain_forward(const Problem& pr) {
  clear(pr.out, pr.batch_q, pr.rows_q, pr.nheads, pr.headdim_v);
  clear(pr.lse, pr.batch_q, pr.rows_q, pr.nheads, 1, pr.empty_lse());
  const DropoutRule rule(pr.scores.dropout);
  for (int64_t b = 0; b < pr.batch; ++b) {
    for (int64_t h = 0; h < pr.nheads; ++h) {
      const Head head(pr, b, h);
      Block out(head.s.seqlen_q, pr.headdim_v);
      for (int64_t i = 0; i < out.rows; ++i) {
        for (int64_t j = 0; j < head.s.seqlen_k; ++j) {
          const float p = rounded(head.p[i][j] * head.kept(rule, i, j), pr.dtype);
          for (int64_t d = 0; d < out.cols; ++d) out[i][d] += p * head.v[j][d];
        }
        const float lse = head.lse[static_cast<std::size_t>(i)];
        if (pr.lse.present()) {
          store(pr.lse.at(head.s.q_batch, head.s.q_row + i, h), DType::f32, lse == -INFINITY ? pr.empty_lse() : lse);
        }
      }
      store_rows(pr.out, head.s.q_batch, head.s.q_row, h, out);
    }
  }
}

void plain_backward(const Problem& pr, Recall recall) {
  const ScorePipeline& sp = pr.scores;
  clear(pr.dq, pr.batch_q, pr.rows_q, pr.nheads, pr.headdim);
  clear(pr.dk, pr.batch_k, pr.rows_k, pr.nheads_k, pr.headdim);
  clear(pr.dv, pr.batch_k, pr.rows_k, pr.nheads_k, pr.headdim_v);
  const int64_t* bias = sp.bias_shape;  // (batch | 1, nheads | 1, seqlen_q | 1, seqlen_k)
  clear(pr.dbias, bias[0], bias[2], bias[1], bias[3]);
  clear(pr.dsink, 1, 1, pr.nheads, 1);
  const DropoutRule rule(sp.dropout);
  const float scale = static_cast<float>(sp.scale);
  for (int64_t b = 0; b < pr.batch; ++b) {
    for (int64_t hk = 0; hk < pr.nheads_k; ++hk) {
      const Sequence s = pr.sequences.at(b);
      Block dk(s.seqlen_k, pr.headdim), dv(s.seqlen_k, pr.headdim_v);
      for (int64_t h = hk * pr.group(); h < (hk + 1) * pr.group(); ++h) {
        Head head(pr, b, h);
        const Block dout = load_q(pr.dout, s, h, pr.headdim_v), out = load_q(pr.out, s, h, pr.headdim_v);
        Block dq(s.seqlen_q, pr.headdim);
        std::vector<float> dp(static_cast<std::size_t>(s.seqlen_k));
        for (int64_t i = 0; i < s.seqlen_q; ++i) {
          const Interval keys = sp.mask.row(i, s.seqlen_q, s.seqlen_k);
          float delta = 0;
          for (int64_t j = keys.lo; j < keys.hi; ++j) {
            float& g = dp[static_cast<std::size_t>(j)];
            g = head.kept(rule, i, j) * rounded(dot(dout[i], head.v[j], pr.headdim_v), pr.dtype);
            delta += head.p[i][j] * g;
          }
          if (recall == Recall::recomputed) {
            head.recompute(i, load(pr.lse.at(s.q_batch, s.q_row + i, h), DType::f32));
            delta = dot(dout[i], out[i], pr.headdim_v);
          }
          if (pr.dlse.present()) delta -= load(pr.dlse.at(s.q_batch, s.q_row + i, h), DType::f32);
          for (int64_t j = keys.lo; j < keys.hi; ++j) {
            float ds = head.p[i][j] * (dp[static_cast<std::size_t>(j)] - delta);
            if (pr.dbias.present()) {
              char* sum = element(pr.dbias, b, i, h, j);
              store(sum, DType::f32, load(sum, DType::f32) + ds);
            }
            if (sp.softcap > 0) ds *= 1 - head.capped[i][j] * head.capped[i][j];
            ds = rounded(ds, pr.dtype);
            const float p = rounded(head.p[i][j] * head.kept(rule, i, j), pr.dtype);
            for (int64_t d = 0; d < pr.headdim; ++d) {
              dq[i][d] += scale * ds * head.k[j][d];
              dk[j][d] += scale * ds * head.q[i][d];
            }
            for (int64_t d = 0; d < pr.headdim_v; ++d) dv[j][d] += p * dout[i][d];
          }
          if (pr.dsink.present()) {
            char* sum = pr.dsink.at(0, 0, h);
            store(sum, DType::f32, load(sum, DType::f32) - head.sink_probability(i) * delta);
          }
        }
        store_rows(pr.dq, s.q_batch, s.q_row, h, dq);
      }
      store_rows(pr.dk, s.k_batch, s.k_row, hk, dk);
      store_rows(pr.dv, s.k_batch, s.k_row, hk, dv);
    }
  }
}

class PlainBackend final : public Backend {
 public:
  PlainBackend(const std::string& name, Recall recall) : name_(name), recall_(recall) {}
  std::string_view name() const override { return name_; }
  std::string_view description() const override {
    return "the plain arithmetic of the input's dtype: verify's yardstick";
  }
  std::span<const int32_t> devices() const override { return kHostMemory; }
  const Serves* serves(Pass) const override { return &kServesAll; }
  bool automatic() const override { return false; }
  void forward(const Problem& problem) const override {
    if (!problem.append.present()) return plain_forward(problem);
    const RotatedQueries queries(problem);
    append_all(problem, queries.operand());
    plain_forward(queries.attend_after(problem));
  }
  void backward(const Problem& problem) const override { plain_backward(problem, recall_); }

 private:
  std::string name_;
  Recall recall_;
};

}  // namespace

std::unique_ptr<Backend> make_plain_backend(const std::string& name, Recall recall) {
  return std::make_unique<PlainBackend>(name, recall);
}

}  // namespace flash_attn::cli
