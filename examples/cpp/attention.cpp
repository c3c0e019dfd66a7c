// Causal attention in ten lines of C++, checked against plain loops.
#include <cmath>
#include <cstdio>
#include <flash_attn/flash_attn.hpp>
#include <vector>

namespace {

// q, k, v, out: (batch, seqlen, nheads, headdim)
constexpr int B = 2, S = 33, H = 4, D = 64;

int at(int b, int i, int h) { return ((b * S + i) * H + h) * D; }

/// out of query i by the definition: softmax over keys 0..i of q.k / sqrt(D), times v.
std::vector<double> naive_row(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                              int b, int i, int h) {
  std::vector<double> row(D, 0.0);
  double sum = 0.0;
  for (int j = 0; j <= i; ++j) {
    double score = 0.0;
    for (int d = 0; d < D; ++d) score += double{q[at(b, i, h) + d]} * k[at(b, j, h) + d];
    const double weight = std::exp(score / std::sqrt(double{D}));
    sum += weight;
    for (int d = 0; d < D; ++d) row[d] += weight * v[at(b, j, h) + d];
  }
  for (double& x : row) x /= sum;
  return row;
}

}  // namespace

int main() {
  std::vector<float> q(B * S * H * D), k(q.size()), v(q.size()), out(q.size());
  for (std::size_t i = 0; i < q.size(); ++i)
    q[i] = std::sin(0.1f * i), k[i] = std::cos(0.3f * i), v[i] = std::sin(0.7f * i);

  using flash_attn::view;
  try {
    flash_attn::forward({.q = view(q.data(), {B, S, H, D}),
                         .k = view(k.data(), {B, S, H, D}),
                         .v = view(v.data(), {B, S, H, D}),
                         .out = view(out.data(), {B, S, H, D}),
                         .scores = {.causal = true}});
  } catch (const flash_attn::Error& e) {
    std::fprintf(stderr, "flash_attn: %s\n", e.what());
    return 1;
  }

  double worst = 0.0;
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < S; ++i)
      for (int h = 0; h < H; ++h) {
        const std::vector<double> row = naive_row(q, k, v, b, i, h);
        for (int d = 0; d < D; ++d) {
          const double error = std::abs(out[at(b, i, h) + d] - row[d]);
          if (!(error <= worst)) worst = error;  // NaN counts as the worst
        }
      }
  std::printf("FlashAttention-Plus %s (%s): out[0, 5, 0, 0] = %.6f, largest error %.1e\n", flash_attn::version(),
              flash_attn::cpu_isa().c_str(), out[at(0, 5, 0)], worst);
  return worst <= 1e-5 ? 0 : 1;
}
