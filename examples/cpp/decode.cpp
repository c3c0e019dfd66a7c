// Decoding in C++: two sequences over one pool of pages, a prompt and then token by token; checked against one causal
// call. What an inference engine owns: the pages, the table that says whose they are, and the lengths.
#include <cmath>
#include <cstdio>
#include <flash_attn/flash_attn.hpp>
#include <vector>

namespace {

constexpr int kBatch = 2, kHeads = 8, kHeadsK = 2, kDim = 64, kPage = 16;
constexpr int kPrompt = 50, kSteps = 30, kTokens = kPrompt + kSteps, kPages = (kTokens + kPage - 1) / kPage;

std::vector<float> wave(int n, float step) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = std::sin(step * static_cast<float>(i));
  return x;
}

/// Tokens [first, first + n) of x (batch, token, head, col).
flash_attn::Tensor tokens(const std::vector<float>& x, int heads, int first, int n) {
  flash_attn::Tensor t = flash_attn::view(x.data() + first * heads * kDim, {kBatch, n, heads, kDim});
  t.stride[0] = kTokens * heads * kDim;
  return t;
}

}  // namespace

int main() {
  using flash_attn::view;
  // What a model would compute layer by layer, here all at once: (batch, token, head, col).
  const std::vector<float> q = wave(kBatch * kTokens * kHeads * kDim, 0.13f),
                           k = wave(kBatch * kTokens * kHeadsK * kDim, 0.29f),
                           v = wave(kBatch * kTokens * kHeadsK * kDim, 0.71f);
  std::vector<float> out(q.size()), want(q.size());

  // Sequence b has every second page, from the last one down.
  std::vector<float> k_pages(kBatch * kPages * kPage * kHeadsK * kDim), v_pages(k_pages.size());
  std::vector<int32_t> table(kBatch * kPages), lengths(kBatch, 0);
  for (int b = 0; b < kBatch; ++b)
    for (int i = 0; i < kPages; ++i) table[b * kPages + i] = kBatch * (kPages - 1 - i) + b;

  try {
    for (int first = 0, n = kPrompt; first < kTokens; first += n, n = 1) {
      flash_attn::forward({
          .q = tokens(q, kHeads, first, n),
          .k = view(k_pages.data(), {kBatch * kPages, kPage, kHeadsK, kDim}),
          .v = view(v_pages.data(), {kBatch * kPages, kPage, kHeadsK, kDim}),
          .out = tokens(out, kHeads, first, n),
          .sequences = {.seqused_k = view(lengths.data(), {kBatch}),
                        .block_table = view(table.data(), {kBatch, kPages})},
          .scores = {.causal = true},
          .new_keys = {.k = tokens(k, kHeadsK, first, n), .v = tokens(v, kHeadsK, first, n)},
      });
      for (int32_t& length : lengths) length += n;
    }
    flash_attn::forward({.q = tokens(q, kHeads, 0, kTokens),
                         .k = tokens(k, kHeadsK, 0, kTokens),
                         .v = tokens(v, kHeadsK, 0, kTokens),
                         .out = tokens(want, kHeads, 0, kTokens),
                         .scores = {.causal = true}});
  } catch (const flash_attn::Error& e) {
    std::fprintf(stderr, "flash_attn: %s\n", e.what());
    return 1;
  }

  double worst = 0.0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double error = std::abs(double{out[i]} - want[i]);
    if (!(error <= worst)) worst = error;  // NaN counts as the worst
  }
  std::printf("A prompt of %d tokens and %d steps in pages of %d: largest difference from one causal call %.1e\n",
              kPrompt, kSteps, kPage, worst);
  return worst <= 1e-5 ? 0 : 1;
}
