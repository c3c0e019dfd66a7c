// verify: every backend against the oracle over the table of features. judge.hpp says what counts as right.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <map>
#include <tuple>

#include "commands.hpp"
#include "dtype.hpp"
#include "judge.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

struct Flags {
  std::string filter, dtype, backend;
  bool verbose = false;
};

const char* pass_name(Pass pass) { return pass == Pass::forward ? "forward" : "backward"; }

/// The largest error as a part of its bound, and whose it is; 0 where nothing was judged.
std::pair<double, std::string> worst_of(const Outcome& o) {
  double worst = 0;
  std::string result;
  for (const Judged& j : o.judged) {
    const double part = j.bound > 0 ? j.error / j.bound : 0.0;
    if (part >= worst) worst = part, result = j.result;
  }
  return {worst, result};
}

Table::Cell verdict(const Outcome& o) {
  if (!o.refused.empty()) return {"refused: " + o.refused, Colour::yellow};
  if (!o.failed.empty()) return {"FAILED: " + o.failed, Colour::red};
  return {fmt::format("ok, {:.2f} of the bound", worst_of(o).first), Colour::green};
}

/// A line for each backend, dtype and pass.
void print_summary(const std::vector<Outcome>& outcomes) {
  struct Line {
    std::size_t cases = 0, within = 0, refused = 0, failed = 0;
    double worst = 0;
    std::string where;
  };
  std::map<std::tuple<std::string, DType, Pass>, Line> lines;
  for (const Outcome& o : outcomes) {
    Line& line = lines[{o.backend, o.dtype, o.pass}];
    ++line.cases;
    ++(!o.refused.empty() ? line.refused : !o.failed.empty() ? line.failed : line.within);
    if (const auto [worst, result] = worst_of(o); worst > line.worst)
      line.worst = worst, line.where = fmt::format("{} of {}", result, o.feature);
  }
  Table table({"backend", "dtype", "pass", ">cases", ">within", ">refused", ">FAILED", "largest error, of its bound"});
  for (const auto& [key, line] : lines) {
    const auto& [backend, dtype, pass] = key;
    const auto count = [](std::size_t n, Colour colour) {
      return Table::Cell(n ? std::to_string(n) : "-", n ? colour : Colour::none);
    };
    table.add({backend, short_name(dtype), pass_name(pass), std::to_string(line.cases),
               count(line.within, Colour::green), count(line.refused, Colour::yellow), count(line.failed, Colour::red),
               line.where.empty() ? "" : fmt::format("{:.2f}: {}", line.worst, line.where)});
  }
  table.print();
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
  if (names.empty()) {
    for (const BackendInfo& b : backends()) {
      if (b.unavailable.empty()) names.push_back(b.name);
    }
    throw Error(ErrorCode::invalid_argument,
                fmt::format("--backend: expected one of {}, got {}", fmt::join(names, ", "), flags.backend));
  }
  Judge judge(names);
  uint64_t seed = 0;
  std::size_t cases = 0;
  for (const Case& c : feature_cases()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      ++seed;
      if (c.name.find(flags.filter) == std::string::npos || (!flags.dtype.empty() && flags.dtype != short_name(dtype)))
        continue;
      if (isatty(STDERR_FILENO)) fmt::print(stderr, "\r\033[K{} {}", c.name, short_name(dtype));
      judge.take(c, dtype, seed);
      ++cases;
    }
  }
  if (isatty(STDERR_FILENO)) fmt::print(stderr, "\r\033[K");
  if (cases == 0)
    throw Error(ErrorCode::invalid_argument, fmt::format("--filter: no feature contains {}", flags.filter));

  const std::vector<Outcome>& all = judge.outcomes();
  const auto failed = static_cast<std::size_t>(
      std::count_if(all.begin(), all.end(), [](const Outcome& o) { return !o.failed.empty(); }));
  const auto refused = static_cast<std::size_t>(
      std::count_if(all.begin(), all.end(), [](const Outcome& o) { return !o.refused.empty(); }));
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (json.tables()) {
    std::vector<Outcome> rows;
    std::copy_if(all.begin(), all.end(), std::back_inserter(rows),
                 [&](const Outcome& o) { return flags.verbose || !o.failed.empty(); });
    if (!rows.empty()) {
      print_table(rows);
      fmt::print("\n");
    }
    print_summary(all);
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
  command->add_flag("-v,--verbose", flags->verbose, "A row for every case, not only for those that fail");
  const auto json = JsonOption::add_to(*command);
  command->callback([flags, json, &exit_status] { exit_status = verify(*flags, *json); });
}

}  // namespace flash_attn::cli
