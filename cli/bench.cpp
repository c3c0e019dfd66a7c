// bench limit: which fraction of the machine's own peak the kernels reach.
//
// Absolute times mean little on a shared machine whose clock moves. So every kernel sample is followed by a probe
// sample (multiply-adds on registers, in the same instruction set, on as many threads; for decode: reads of a buffer
// larger than the caches), and the fraction is the ratio of the two minima: both are taken in the machine's best
// moments.
//
//   flops: 4 batch nheads seqlen_q seqlen_k headdim forward (two products, two operations each), half of it under a
//   causal mask; 2.5 times that backward (five products).
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>

#include "commands.hpp"
#include "dtype.hpp"
#include "flash_attn/flash_attn.hpp"
#include "machine.hpp"
#include "probe.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

struct Flags {
  bool quick = false, decode = false;
  double seconds = 0;
  int threads = 0;
  std::string filter;
};

struct Cell {
  std::string name;  // forward, backward, decode
  DType dtype;
  int64_t nheads, nheads_k, seqlen_q, seqlen_k, headdim;
  bool causal;
  int threads;

  std::string heads() const { return fmt::format("{}:{}", nheads, nheads_k); }
  std::string title() const {
    return fmt::format("{} {} headdim {} {} {} thread{}, heads {}", name, short_name(dtype), headdim,
                       causal ? "causal" : "full", threads, threads == 1 ? "" : "s", heads());
  }
  double flops() const {
    const double products = name == "backward" ? 10.0 : 4.0;
    return products * static_cast<double>(nheads * seqlen_q) * static_cast<double>(seqlen_k * headdim) *
           (causal ? 0.5 : 1.0);
  }
  double bytes() const {
    return 2.0 * static_cast<double>(nheads_k * seqlen_k * headdim) * static_cast<double>(size_of(dtype));
  }
};

struct Result {
  Cell cell;
  double seconds, rate, probe_rate;  // rate: operations, for decode bytes, per second
  int samples;
  double of_peak() const { return rate / probe_rate; }
};

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

/// One head for each thread, so that a sample is about as long on one thread as on all.
std::vector<Cell> cells(const Flags& flags, int all_threads) {
  std::vector<int> threads{1};
  if (flags.threads > 0)
    threads = {flags.threads};
  else if (all_threads > 1)
    threads.push_back(all_threads);
  const std::vector<DType> dtypes =
      flags.quick ? std::vector{DType::f32, DType::bf16} : std::vector{DType::f32, DType::bf16, DType::f16};
  const int64_t seqlen = flags.quick ? 2048 : 4096;
  std::vector<Cell> list;
  for (const char* name : {"forward", "backward"}) {
    for (const DType dtype : dtypes) {
      for (const int64_t headdim : {64, 128}) {
        for (const bool causal : {false, true}) {
          for (const int t : threads) list.push_back({name, dtype, t, t, seqlen, seqlen, headdim, causal, t});
        }
      }
    }
  }
  if (flags.decode) {
    for (const DType dtype : dtypes) {
      // 256 MiB of keys and values: beyond the caches.
      const int64_t keys = (int64_t{256} << 20) / (2 * 8 * 128 * static_cast<int64_t>(size_of(dtype)));
      for (const int64_t group : {1, 4, 8})
        for (const int t : threads) list.push_back({"decode", dtype, 8 * group, 8, 1, keys, 128, false, t});
    }
  }
  std::erase_if(list, [&](const Cell& c) { return c.title().find(flags.filter) == std::string::npos; });
  return list;
}

Json to_json(const Result& r, const std::string& device, const std::string& isa) {
  const Cell& c = r.cell;
  return Json::object({{"name", c.name},
                       {"dtype", short_name(c.dtype)},
                       {"batch", 1},
                       {"nheads_q", c.nheads},
                       {"nheads_k", c.nheads_k},
                       {"seqlen_q", c.seqlen_q},
                       {"seqlen", c.seqlen_k},
                       {"headdim", c.headdim},
                       {"causal", c.causal},
                       {"threads", c.threads},
                       {"device", device},
                       {"isa", isa},
                       {"gflops", c.flops() / r.seconds * 1e-9},
                       {"of_peak", r.of_peak()},
                       {"peer", Json()},
                       {"speedup", Json()}});
}

void bench_limit(const Flags& flags, const JsonOption& json) {
  const std::string device = cpu_model(), isa = cpu_isa();
  const std::vector<Cell> list = cells(flags, num_threads());
  if (list.empty())
    throw Error(ErrorCode::invalid_argument, fmt::format("--filter: no cell contains \"{}\"", flags.filter));
  const double budget = flags.seconds > 0 ? flags.seconds : flags.quick ? 0.4 : 1.2;
  const bool progress = isatty(STDERR_FILENO);
  Table table({"pass", "dtype", ">heads", ">headdim", ">seqlen", "mask", ">threads", ">ms", ">GFLOP/s", ">peak",
               ">of peak", ">samples"});
  std::vector<Json> records;
  for (const Cell& c : list) {
    if (progress) fmt::print(stderr, "\r\033[K{} of {}: {}", records.size() + 1, list.size(), c.title());
    const Result r = measure(c, budget);
    const bool decode = c.name == "decode";
    table.add({c.name,
               short_name(c.dtype),
               c.heads(),
               std::to_string(c.headdim),
               std::to_string(c.seqlen_k),
               c.causal ? "causal" : "full",
               std::to_string(c.threads),
               fmt::format("{:.2f}", r.seconds * 1e3),
               fmt::format("{:.1f}", c.flops() / r.seconds * 1e-9),
               fmt::format("{:.1f}{}", r.probe_rate * 1e-9, decode ? " GB/s" : ""),
               {fmt::format("{:.1f} %", 100 * r.of_peak()), r.of_peak() >= 0.8 ? Colour::green : Colour::yellow},
               std::to_string(r.samples)});
    records.push_back(to_json(r, device, isa));
  }
  set_num_threads(0);
  if (progress) fmt::print(stderr, "\r\033[K");
  if (json.tables()) {
    fmt::print("{}, {}; batch 1; the probe runs between the kernel's samples, ratio of minima\n\n", device, isa);
    table.print();
  }
  json.write(Json::array(records, true));
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Measurements");
  bench->require_subcommand(1);
  CLI::App* limit = bench->add_subcommand("limit", "Fractions of this machine's own peak");
  const auto flags = std::make_shared<Flags>();
  limit->add_flag("--quick", flags->quick, "Fewer and shorter cells");
  limit->add_flag("--decode", flags->decode, "Also one query against a long cache, of the read bandwidth");
  limit->add_option("--seconds", flags->seconds, "For each cell")->check(CLI::PositiveNumber);
  limit->add_option("--threads", flags->threads, "Only this many threads (default: one, and all)")
      ->check(CLI::PositiveNumber);
  limit->add_option("--filter", flags->filter,
                    "Only cells whose words contain this: \"forward fp32 headdim 64 full 1 thread\"");
  const auto json = JsonOption::add_to(*limit);
  limit->callback([flags, json] { bench_limit(*flags, *json); });
}

}  // namespace flash_attn::cli
