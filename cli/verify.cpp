// verify: every backend against the oracle over the table of features.
//
// The oracle computes in fp64 on the same numbers. The bound of each result x is
//
//   orders * max(error of the plain arithmetic, u max|x|) + 2^-24 * largest term
//
// plain:   plain.cpp's arithmetic; the larger error of its two ways to get at the probabilities of the backward.
// u:       the unit roundoff of the result's dtype: the error of writing the exact value down.
// orders:  1 for 16-bit results. 2 for fp32 ones: there both are fp32 sums in different orders, two draws from one
//          distribution, and the larger of two such draws is ours half of the time.
// term:    one fp32 rounding of the largest term that the sums can have, for results whose exact value cancels to 0.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

#include "commands.hpp"
#include "core/backend.hpp"
#include "dtype.hpp"
#include "instance.hpp"
#include "plain.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

constexpr const char* kOracle = "reference";
constexpr const char *kKept = "plain", *kRecomputed = "plain, recomputed";

struct Flags {
  std::string filter, dtype, backend;
};

struct Judged {
  std::string result;  // "out", "dq", ...
  double error, plain, bound;
};

struct Outcome {
  std::string feature, backend;
  DType dtype;
  Pass pass;
  std::string refused, failed;  // empty: neither
  std::vector<Judged> judged;
};

/// The largest difference. Infinities and NaNs must be the same, and in the same places, or it is infinite.
double max_error(const std::vector<double>& exact, const std::vector<double>& x) {
  double worst = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    if (exact[i] == x[i] || (std::isnan(exact[i]) && std::isnan(x[i]))) continue;
    const double difference = std::abs(exact[i] - x[i]);
    worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
  }
  return worst;
}

double largest(const std::vector<double>& x) {
  double m = 0;
  for (const double v : x) {
    if (std::isfinite(v)) m = std::max(m, std::abs(v));
  }
  return m;
}

/// The largest Euclidean norm of a row of `cols` values.
double largest_norm(const std::vector<double>& x, int64_t cols) {
  double worst = 0, sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    sum += x[i] * x[i];
    if ((static_cast<int64_t>(i) + 1) % cols == 0) worst = std::max(worst, sum), sum = 0;
  }
  return std::sqrt(worst);
}

/// The largest terms of each result's sums: |score| and |dP| are at most the products of the largest norms.
std::map<std::string, double> largest_terms(const Case& c, const Values& x) {
  const double scale = c.softmax_scale > 0 ? c.softmax_scale : 1 / std::sqrt(static_cast<double>(c.headdim));
  const double score = scale * largest_norm(x.at("q"), c.headdim) * largest_norm(x.at("k"), c.headdim);
  // Two terms of that size, dP and its row sum, are subtracted: each brings its rounding.
  const double dp = 2 * largest_norm(x.at("dout"), c.dim_v()) * largest_norm(x.at("v"), c.dim_v());
  return {{"out", largest(x.at("v"))},
          {"lse", score},
          {"dq", scale * dp * largest(x.at("k"))},
          {"dk", scale * dp * largest(x.at("q"))},
          {"dv", largest(x.at("dout"))},
          {"dbias", dp},
          {"dsink", dp}};
}

const char* pass_name(Pass pass) { return pass == Pass::forward ? "forward" : "backward"; }

/// What explain says against it; empty if the backend serves the call.
std::string refusal(const Instance& x, Pass pass, const std::string& backend) {
  const Explanation e = pass == Pass::forward ? explain(x.forward(backend)) : explain(x.backward(backend));
  for (const Candidate& c : e.candidates) {
    if (c.backend == backend) return c.why_not;
  }
  return "not a candidate";
}

void run(Instance& x, Pass pass, const std::string& backend) {
  x.spoil(pass);
  if (pass == Pass::forward) {
    flash_attn::forward(x.forward(backend));
  } else {
    flash_attn::backward(x.backward(backend));
  }
}

class Verification {
 public:
  explicit Verification(std::vector<std::string> backend_names) : backends_(std::move(backend_names)) {}

  void take(const Case& c, DType dtype, uint64_t seed) {
    const Values values = draw_values(c, dtype, seed);
    const std::map<std::string, double> terms = largest_terms(c, values);
    Instance exact(c, DType::f64, values), kept(c, dtype, values), recomputed(c, dtype, values);
    const std::vector<Pass> passes =
        c.differentiable() ? std::vector{Pass::forward, Pass::backward} : std::vector{Pass::forward};
    for (const Pass pass : passes) {
      run(exact, pass, kOracle);
      run(kept, pass, kKept);
      run(recomputed, pass, kRecomputed);
    }
    for (const std::string& backend : backends_) {
      Instance x(c, dtype, values);
      for (const Pass pass : passes) {
        Outcome outcome{c.name, backend, dtype, pass, refusal(x, pass, backend), {}, {}};
        const bool served = outcome.refused.empty();
        if (served) {
          try {
            run(x, pass, backend);
            judge(outcome, terms, exact, kept, recomputed, x);
          } catch (const std::exception& e) {
            outcome.failed = e.what();
          }
        }
        outcomes_.push_back(std::move(outcome));
        if (!served) break;  // its gradient would need the forward's results
      }
    }
  }

  const std::vector<Outcome>& outcomes() const { return outcomes_; }

 private:
  static void judge(Outcome& outcome, const std::map<std::string, double>& terms, const Instance& exact,
                    const Instance& kept, const Instance& recomputed, const Instance& x) {
    for (const std::string& name : x.results(outcome.pass)) {
      const std::vector<double> truth = exact.read(name);
      const bool is_fp32 = outcome.dtype == DType::f32 || name == "lse" || name == "dbias" || name == "dsink";
      const double u = unit_roundoff(is_fp32 ? DType::f32 : outcome.dtype), orders = is_fp32 ? 2 : 1;
      const double plain = std::max(max_error(truth, kept.read(name)), max_error(truth, recomputed.read(name)));
      const double bound = orders * std::max(plain, u * largest(truth)) + 0x1p-24 * terms.at(name);
      const double error = max_error(truth, x.read(name));
      if (!(error <= bound)) {
        outcome.failed +=
            fmt::format("{}{}: error {:.2e} above {:.2e}", outcome.failed.empty() ? "" : "; ", name, error, bound);
      }
      outcome.judged.push_back({name, error, plain, bound});
    }
  }

  std::vector<std::string> backends_;
  std::vector<Outcome> outcomes_;
};

Table::Cell verdict(const Outcome& o) {
  if (!o.refused.empty()) return {"refused: " + o.refused, Colour::yellow};
  if (!o.failed.empty()) return {"FAILED: " + o.failed, Colour::red};
  double worst = 0;
  for (const Judged& j : o.judged) worst = std::max(worst, j.bound > 0 ? j.error / j.bound : 0.0);
  return {fmt::format("ok, {:.2f} of the bound", worst), Colour::green};
}

/// "3.1e-08 < 1.5e-07" in the column of each result.
void print_table(const std::vector<Outcome>& outcomes) {
  Table table({"feature", "dtype", "backend", "pass", "out | dq", "lse | dk", "dv", "verdict"});
  for (const Outcome& o : outcomes) {
    std::vector<Table::Cell> row{o.feature, short_name(o.dtype), o.backend, pass_name(o.pass)};
    for (std::size_t i = 0; i < 3; ++i) {
      row.emplace_back(i < o.judged.size() ? fmt::format("{:.1e} < {:.1e}", o.judged[i].error, o.judged[i].bound) : "");
      if (i < o.judged.size() && !(o.judged[i].error <= o.judged[i].bound)) {
        row.back() = {fmt::format("{:.1e} > {:.1e}", o.judged[i].error, o.judged[i].bound), Colour::red};
      }
    }
    row.push_back(verdict(o));
    table.add(std::move(row));
  }
  table.print();
}

Json to_json(const Outcome& o) {
  std::vector<std::pair<std::string, Json>> errors;
  for (const Judged& j : o.judged)
    errors.emplace_back(j.result, Json::object({{"error", j.error}, {"plain", j.plain}, {"bound", j.bound}}));
  return Json::object({{"feature", o.feature},
                       {"dtype", short_name(o.dtype)},
                       {"backend", o.backend},
                       {"pass", pass_name(o.pass)},
                       {"state", !o.refused.empty() ? "refused"
                                 : o.failed.empty() ? "ok"
                                                    : "failed"},
                       {"words", !o.refused.empty() ? Json(o.refused)
                                 : o.failed.empty() ? Json()
                                                    : Json(o.failed)},
                       {"errors", Json::object(errors)}});
}

int verify(const Flags& flags, const JsonOption& json) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::string> names;
  for (const BackendInfo& b : backends()) {
    if (b.unavailable.empty() && (flags.backend.empty() || flags.backend == b.name)) names.push_back(b.name);
  }
  if (names.empty())
    throw Error(ErrorCode::invalid_argument,
                fmt::format("--backend: no usable backend is named \"{}\"", flags.backend));
  register_backend(make_plain_backend(kKept, Recall::kept));
  register_backend(make_plain_backend(kRecomputed, Recall::recomputed));
  Verification verification(names);
  uint64_t seed = 0;
  std::size_t cases = 0;
  for (const Case& c : feature_cases()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      ++seed;
      if (c.name.find(flags.filter) == std::string::npos || (!flags.dtype.empty() && flags.dtype != short_name(dtype)))
        continue;
      if (isatty(STDERR_FILENO)) fmt::print(stderr, "\r\033[K{} {}", c.name, short_name(dtype));
      verification.take(c, dtype, seed);
      ++cases;
    }
  }
  if (isatty(STDERR_FILENO)) fmt::print(stderr, "\r\033[K");
  unregister_backend(kKept);
  unregister_backend(kRecomputed);
  if (cases == 0)
    throw Error(ErrorCode::invalid_argument, fmt::format("--filter: no feature contains \"{}\"", flags.filter));

  const std::vector<Outcome>& all = verification.outcomes();
  const auto failed = static_cast<std::size_t>(
      std::count_if(all.begin(), all.end(), [](const Outcome& o) { return !o.failed.empty(); }));
  const auto refused = static_cast<std::size_t>(
      std::count_if(all.begin(), all.end(), [](const Outcome& o) { return !o.refused.empty(); }));
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (json.tables()) {
    print_table(all);
    std::size_t results = 0, below_plain = 0;
    for (const Outcome& o : all) {
      results += o.judged.size();
      for (const Judged& j : o.judged) below_plain += j.error <= j.plain;
    }
    fmt::print(
        "\nError < bound, both against the {} backend in fp64 on the same numbers. The bound is the error of plain\n"
        "arithmetic in the input's dtype (fp32 softmax; P, dP and dS rounded to 16 bits for 16-bit inputs), or one\n"
        "rounding of the result if that is larger, twice that for fp32 results, plus one fp32 rounding of the largest "
        "term.\n"
        "{} of {} errors are at most the plain arithmetic's own. CPU instruction set: {}, {} threads.\n\n",
        kOracle, below_plain, results, cpu_isa(), num_threads());
    fmt::print("{}, {} refused, in {:.0f} s\n",
               failed
                   ? painted(fmt::format("{} of {} FAILED", failed, all.size()), Colour::red)
                   : painted(fmt::format("{} of {} within the bound", all.size() - refused, all.size()), Colour::green),
               refused, seconds);
  }
  std::vector<Json> records;
  for (const Outcome& o : all) records.push_back(to_json(o));
  json.write(Json::array(records, true));
  return failed ? 1 : 0;
}

}  // namespace

void add_verify(CLI::App& app, int& exit_status) {
  CLI::App* command = app.add_subcommand("verify", "Every backend against the oracle, over a table of features");
  const auto flags = std::make_shared<Flags>();
  command->add_option("--filter", flags->filter, "Only features whose name contains this");
  command->add_option("--dtype", flags->dtype, "Only this dtype")->check(CLI::IsMember({"fp32", "bf16", "fp16"}));
  command->add_option("--backend", flags->backend, "Only this backend");
  const auto json = JsonOption::add_to(*command);
  command->callback([flags, json, &exit_status] { exit_status = verify(*flags, *json); });
}

}  // namespace flash_attn::cli
