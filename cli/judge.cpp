#include "judge.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "dtype.hpp"
#include "flash_attn/flash_attn.hpp"
#include "instance.hpp"
#include "plain.hpp"

namespace flash_attn::cli {
namespace {

constexpr const char *kKept = "plain", *kRecomputed = "plain, recomputed";

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

void compare(Outcome& outcome, const std::map<std::string, double>& terms, const Instance& exact, const Instance& kept,
             const Instance& recomputed, const Instance& x) {
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

}  // namespace

Judge::Judge(std::vector<std::string> backend_names) : backends_(std::move(backend_names)) {
  register_backend(make_plain_backend(kKept, Recall::kept));
  register_backend(make_plain_backend(kRecomputed, Recall::recomputed));
}

Judge::~Judge() {
  unregister_backend(kKept);
  unregister_backend(kRecomputed);
}

void Judge::take(const Case& c, DType dtype, uint64_t seed) {
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
          compare(outcome, terms, exact, kept, recomputed, x);
        } catch (const std::exception& e) {
          outcome.failed = e.what();
        }
      }
      outcomes_.push_back(std::move(outcome));
      if (!served) break;  // its gradient would need the forward's results
    }
  }
}

}  // namespace flash_attn::cli
