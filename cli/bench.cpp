// bench limit: which fraction of the machine's own peak the kernels reach.
//
//   flops: 4 batch nheads seqlen_q seqlen_k headdim forward (two products, two operations each), half of it under a
//   causal mask; 2.5 times that backward (five products).
#include <fmt/format.h>
#include <unistd.h>

#include "commands.hpp"
#include "flash_attn/flash_attn.hpp"
#include "machine.hpp"
#include "measure.hpp"
#include "options.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

struct Flags {
  bool quick = false, decode = false;
  double seconds = 0;
  int threads = 0;
  std::string filter;
};

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
  limit->add_option("--seconds", flags->seconds, "For each cell")->check(positive_number());
  limit->add_option("--threads", flags->threads, "Only this many threads (default: one, and all)")
      ->check(integer_from(1))
      ->type_name("N");
  limit->add_option("--filter", flags->filter,
                    "Only cells whose words contain this: \"forward fp32 headdim 64 full 1 thread\"");
  const auto json = JsonOption::add_to(*limit);
  limit->callback([flags, json] { bench_limit(*flags, *json); });
}

}  // namespace flash_attn::cli
