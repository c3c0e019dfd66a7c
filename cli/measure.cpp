// Every kernel sample is followed by a probe sample (multiply-adds on registers, in the same instruction set, on as
// many threads; for decode: reads of a buffer larger than the caches), and the fraction is the ratio of the two minima:
// both are taken in the machine's best moments. Absolute times mean little on a shared machine whose clock moves.
#include "measure.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "flash_attn/flash_attn.hpp"
#include "probe.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

/// Memory aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : data_(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096)) {
    if (!data_)
      throw Error(ErrorCode::out_of_memory, fmt::format("cannot allocate {}", bytes_text(static_cast<double>(bytes))));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void* data() const { return data_; }

 private:
  void* data_;
};

/// A (1, rows, heads, cols) tensor of normal values, or of zeros.
class Operand {
 public:
  Operand(DType dtype, int64_t rows, int64_t heads, int64_t cols, uint64_t seed)
      : memory_(static_cast<std::size_t>(rows * heads * cols) * size_of(dtype)),
        tensor_(view(memory_.data(), dtype, {1, rows, heads, cols})) {
    // A period of values is enough: what matters is that none is zero or denormal.
    std::mt19937_64 generator(seed);
    std::normal_distribution<float> normal;
    float values[4093];
    for (float& v : values) v = normal(generator);
    for (int64_t i = 0; i < tensor_.numel(); ++i) {
      const float x = values[i % 4093];
      if (dtype == DType::f32) static_cast<float*>(memory_.data())[i] = x;
      if (dtype == DType::bf16) static_cast<uint16_t*>(memory_.data())[i] = bf16_from_float(x);
      if (dtype == DType::f16) static_cast<uint16_t*>(memory_.data())[i] = f16_from_float(x);
    }
  }
  const Tensor& operator*() const { return tensor_; }

 private:
  Buffer memory_;
  Tensor tensor_;
};

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr double kSample = 0.025;  // seconds of a probe sample, and the least of a kernel sample
constexpr int kFewest = 4;         // samples of each, however long one takes

/// Runs `kernel` and `probe` in turns; both return after one unit of their work. The rates are per unit.
Result interleave(const Cell& cell, double budget, const std::function<void()>& kernel, double kernel_work,
                  const std::function<void(int64_t)>& probe, double probe_work) {
  kernel();  // the first call builds arenas and wakes threads
  const auto repeats = [](double once) { return std::max<int64_t>(1, static_cast<int64_t>(kSample / once)); };
  const int64_t kernel_repeats = repeats(seconds_of(kernel));
  int64_t probe_repeats = 1;
  while (seconds_of([&] { probe(probe_repeats); }) < kSample / 2) probe_repeats *= 2;
  double best_kernel = 1e30, best_probe = 1e30, spent = 0;
  int samples = 0;
  for (; samples < kFewest || spent < budget; ++samples) {
    const double k = seconds_of([&] {
      for (int64_t i = 0; i < kernel_repeats; ++i) kernel();
    });
    const double p = seconds_of([&] { probe(probe_repeats); });
    best_kernel = std::min(best_kernel, k / static_cast<double>(kernel_repeats));
    best_probe = std::min(best_probe, p / static_cast<double>(probe_repeats));
    spent += k + p;
  }
  return {cell, best_kernel, kernel_work / best_kernel, probe_work / best_probe, samples};
}

}  // namespace

Result measure(const Cell& c, double budget) {
  set_num_threads(c.threads);
  const Probe& probe = probe_for(cpu_isa());
  Team team(c.threads);
  const Operand q(c.dtype, c.seqlen_q, c.nheads, c.headdim, 1), k(c.dtype, c.seqlen_k, c.nheads_k, c.headdim, 2),
      v(c.dtype, c.seqlen_k, c.nheads_k, c.headdim, 3), out(c.dtype, c.seqlen_q, c.nheads, c.headdim, 4);
  std::vector<float> lse_memory(static_cast<std::size_t>(c.nheads * c.seqlen_q));
  const Tensor lse = view(lse_memory.data(), {1, c.nheads, c.seqlen_q});
  const Scores scores{.causal = c.causal};
  const Forward forward_call{.q = *q, .k = *k, .v = *v, .out = *out, .lse = lse, .scores = scores};

  if (c.name == "decode") {
    const auto floats = static_cast<int64_t>(c.bytes() / 4) / c.threads / 1024 * 1024;
    const Buffer data(static_cast<std::size_t>(floats * c.threads) * 4);
    std::fill_n(static_cast<float*>(data.data()), floats * c.threads, 1.0f);
    std::vector<float> sums(static_cast<std::size_t>(c.threads) * 16);  // a cache line each
    const auto read = [&](int64_t rounds) {
      team.run([&](int t) {
        for (int64_t r = 0; r < rounds; ++r) {
          sums[static_cast<std::size_t>(t) * 16] +=
              probe.read(static_cast<const float*>(data.data()) + t * floats, floats);
        }
      });
    };
    return interleave(
        c, budget, [&] { forward(forward_call); }, c.bytes(), read, 4.0 * static_cast<double>(floats * c.threads));
  }

  constexpr int64_t kRounds = 20000;
  const double probe_work = probe.multiply_add(1) * kRounds * c.threads;
  const auto multiply_add = [&](int64_t rounds) { team.run([&](int) { probe.multiply_add(rounds * kRounds); }); };
  if (c.name == "forward")
    return interleave(
        c, budget, [&] { forward(forward_call); }, c.flops(), multiply_add, probe_work);

  forward(forward_call);
  const Operand dout(c.dtype, c.seqlen_q, c.nheads, c.headdim, 5), dq(c.dtype, c.seqlen_q, c.nheads, c.headdim, 6),
      dk(c.dtype, c.seqlen_k, c.nheads_k, c.headdim, 7), dv(c.dtype, c.seqlen_k, c.nheads_k, c.headdim, 8);
  const Backward backward_call{.dout = *dout,
                               .q = *q,
                               .k = *k,
                               .v = *v,
                               .out = *out,
                               .lse = lse,
                               .dq = *dq,
                               .dk = *dk,
                               .dv = *dv,
                               .scores = scores};
  return interleave(
      c, budget, [&] { backward(backward_call); }, c.flops(), multiply_add, probe_work);
}

}  // namespace flash_attn::cli
