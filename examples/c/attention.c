/* Causal attention over the C ABI, checked against plain loops. */
#include <flash_attn/flash_attn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { B = 2, S = 33, H = 4, D = 64, N = B * S * H * D }; /* q, k, v, out: (batch, seqlen, nheads, headdim) */

static size_t at(int b, int i, int h) { return (((size_t)b * S + i) * H + h) * D; }

/* The largest error of out against softmax over keys 0..i of q.k / sqrt(D), times v; NaN if there is one. */
static double largest_error(const float* q, const float* k, const float* v, const float* out) {
  double worst = 0.0;
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < S; ++i)
      for (int h = 0; h < H; ++h) {
        double row[D] = {0.0}, sum = 0.0;
        for (int j = 0; j <= i; ++j) {
          double score = 0.0, weight;
          for (int d = 0; d < D; ++d) score += (double)q[at(b, i, h) + d] * k[at(b, j, h) + d];
          weight = exp(score / sqrt((double)D));
          sum += weight;
          for (int d = 0; d < D; ++d) row[d] += weight * v[at(b, j, h) + d];
        }
        for (int d = 0; d < D; ++d) {
          const double error = fabs(out[at(b, i, h) + d] - row[d] / sum);
          if (!(error <= worst)) worst = error;
        }
      }
  return worst;
}

int main(void) {
  float* data = malloc(4 * N * sizeof *data);
  float *q = data, *k = data + N, *v = data + 2 * N, *out = data + 3 * N;
  const int64_t shape[4] = {B, S, H, D};
  flash_attn_tensor tq, tk, tv, tout;
  flash_attn_options options;
  flash_attn_forward_args args;
  double worst;

  if (!data) return 1;
  for (int i = 0; i < N; ++i) q[i] = sinf(0.1f * i), k[i] = cosf(0.3f * i), v[i] = sinf(0.7f * i);

  tq = flash_attn_view(q, FLASH_ATTN_F32, 4, shape);
  tk = flash_attn_view(k, FLASH_ATTN_F32, 4, shape);
  tv = flash_attn_view(v, FLASH_ATTN_F32, 4, shape);
  tout = flash_attn_view(out, FLASH_ATTN_F32, 4, shape);
  flash_attn_options_init(&options, sizeof options);
  options.causal = 1;
  flash_attn_forward_args_init(&args, sizeof args);
  args.q = &tq, args.k = &tk, args.v = &tv, args.out = &tout, args.options = &options;
  if (flash_attn_forward(&args) != FLASH_ATTN_OK) {
    fprintf(stderr, "flash_attn: %s\n", flash_attn_last_error());
    free(data);
    return 1;
  }

  worst = largest_error(q, k, v, out);
  printf("FlashAttention-Plus %s from C: out[0, 5, 0, 0] = %.6f, largest error %.1e\n", flash_attn_version(),
         out[at(0, 5, 0)], worst);
  free(data);
  return worst <= 1e-5 ? 0 : 1;
}
