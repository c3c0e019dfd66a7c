#include "probe.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace flash_attn::cli {
namespace {

constexpr int kChains = 12;  // with two constants they fit in 16 registers; two units of latency 4 need 8
volatile float g_sink;       // keeps the result alive

// The same two loops per instruction set. They are a macro because a function's target does not reach into templates
// or lambdas, and a target attribute needs no flags of its own file.
// NOLINTBEGIN(bugprone-macro-parentheses): types and attributes take none
#define FA_DEFINE_PROBE(isa, target, width, MULTIPLY_ADD)                                             \
  target double multiply_add_##isa(int64_t rounds) {                                                  \
    using V = float __attribute__((vector_size(4 * width)));                                          \
    const V x = V{} + 0.999f, y = V{} + 0.001f; /* the fixed point is 1: no overflow, no denormals */ \
    V acc[kChains];                                                                                   \
    for (int c = 0; c < kChains; ++c) acc[c] = V{} + static_cast<float>(c + 2); /* 1 would fold */    \
    for (int64_t r = 0; r < rounds; ++r) {                                                            \
      _Pragma("GCC unroll 12") for (int c = 0; c < kChains; ++c) acc[c] = MULTIPLY_ADD(acc[c], x, y); \
    }                                                                                                 \
    for (int c = 1; c < kChains; ++c) acc[0] += acc[c];                                               \
    g_sink = acc[0][0];                                                                               \
    return 2.0 * width * kChains * static_cast<double>(rounds);                                       \
  }                                                                                                   \
  target float read_##isa(const float* data, int64_t floats) {                                        \
    using V = float __attribute__((vector_size(4 * width)));                                          \
    V acc[8]{};                                                                                       \
    for (int64_t i = 0; i < floats; i += 8 * width) {                                                 \
      const V* p = reinterpret_cast<const V*>(data + i);                                              \
      _Pragma("GCC unroll 8") for (int c = 0; c < 8; ++c) acc[c] += p[c];                             \
    }                                                                                                 \
    float sum = 0;                                                                                    \
    for (int c = 1; c < 8; ++c) acc[0] += acc[c];                                                     \
    for (int c = 0; c < width; ++c) sum += acc[0][c];                                                 \
    return sum;                                                                                       \
  }                                                                                                   \
  constexpr Probe k_##isa{multiply_add_##isa, read_##isa};
// NOLINTEND(bugprone-macro-parentheses)

#define FA_MULTIPLY_THEN_ADD(a, x, y) ((a) * (x) + (y))
#if defined(__x86_64__)
FA_DEFINE_PROBE(baseline, , 4, FA_MULTIPLY_THEN_ADD)
FA_DEFINE_PROBE(avx2, __attribute__((target("avx2,fma"))), 8, _mm256_fmadd_ps)
FA_DEFINE_PROBE(avx512, __attribute__((target("avx512f"))), 16, _mm512_fmadd_ps)
#elif defined(__aarch64__)
#define FA_NEON_MULTIPLY_ADD(a, x, y) vfmaq_f32(y, a, x)
FA_DEFINE_PROBE(baseline, , 4, FA_NEON_MULTIPLY_ADD)
#else
FA_DEFINE_PROBE(baseline, , 4, FA_MULTIPLY_THEN_ADD)
#endif

}  // namespace

const Probe& probe_for([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa.starts_with("avx512") || isa.starts_with("amx")) return k_avx512;
  if (isa.starts_with("avx2")) return k_avx2;
#endif
  return k_baseline;
}

Team::Team(int threads) {
  for (int t = 1; t < threads; ++t) threads_.emplace_back([this, t] { serve(t); });
}

Team::~Team() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void Team::run(const std::function<void(int)>& work) {
  {
    const std::lock_guard lock(mutex_);
    work_ = &work;
    running_ = static_cast<int>(threads_.size());
    ++round_;
  }
  start_.notify_all();
  work(0);
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return running_ == 0; });
}

void Team::serve(int thread) {
  for (uint64_t seen = 0;;) {
    const std::function<void(int)>* work = nullptr;
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      work = work_;
    }
    (*work)(thread);
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}

}  // namespace flash_attn::cli
