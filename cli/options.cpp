#include "options.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace flash_attn::cli {
namespace {

template <class T>
std::optional<T> parsed(const std::string& text) {
  const char* const last = text.data() + text.size();
  T x{};
  if constexpr (std::is_floating_point_v<T>) {  // macOS has no from_chars for them
    char* end = nullptr;
    x = std::strtod(text.c_str(), &end);
    if (text.empty() || end != last) return std::nullopt;
  } else {
    const auto [end, error] = std::from_chars(text.data(), last, x);
    if (error != std::errc{} || end != last) return std::nullopt;
  }
  return x;
}

/// The option's type in the help stays as it is: the checks have no name.
template <class T, class Accept>
CLI::Validator check(std::string expected, Accept accept) {
  return {[expected = std::move(expected), accept](std::string& text) {
            const std::optional<T> x = parsed<T>(text);
            return x && accept(*x) ? std::string() : fmt::format("expected {}, got {}", expected, text);
          },
          ""};
}

/// Levenshtein's distance: insertions, deletions and replacements of a letter.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0]++;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

/// "; did you mean explain?", or nothing where no name is near.
std::string guess(const std::string& word, const std::vector<std::string>& names) {
  const auto near = [&](const std::string& name) { return distance(word, name); };
  const auto best =
      std::min_element(names.begin(), names.end(), [&](const auto& a, const auto& b) { return near(a) < near(b); });
  if (best == names.end() || 3 * near(*best) > best->size()) return {};
  return fmt::format("; did you mean {}?", *best);
}

/// The innermost command that was given, and its full name.
std::pair<const CLI::App*, std::string> innermost(const CLI::App& app) {
  const CLI::App* command = &app;
  std::string name = "flash-attn";
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    name += " " + command->get_name();
  }
  return {command, name};
}

}  // namespace

CLI::Validator integer_from(int64_t low) {
  return check<int64_t>(fmt::format("an integer of at least {}", low),
                        [low](int64_t x) { return x >= low && x <= INT32_MAX; });
}

CLI::Validator positive_number() {
  return check<double>("a number above 0", [](double x) { return x > 0 && std::isfinite(x); });
}

CLI::Validator probability() {
  return check<double>("a probability in [0, 1)", [](double x) { return x >= 0 && x < 1; });
}

std::string words_for(const CLI::App& app, const CLI::Error& error) {
  const auto [command, name] = innermost(app);
  std::vector<std::string> commands, options;
  for (const CLI::App* c : command->get_subcommands([](const CLI::App*) { return true; }))
    commands.push_back(c->get_name());
  for (const CLI::Option* o : command->get_options()) options.push_back(o->get_name());
  const std::vector<std::string> extras = app.remaining(true);
  const std::string extra = extras.empty() ? "" : extras.front();
  if (!extra.empty() && extra.front() == '-')
    return fmt::format("{}: unknown option {}{}", name, extra, guess(extra, options));
  if (!extra.empty() && !commands.empty())
    return fmt::format("{}: unknown command {}{} (it has {})", name, extra, guess(extra, commands),
                       fmt::join(commands, ", "));
  if (!extra.empty()) return fmt::format("{}: unexpected word {}", name, extra);
  if (dynamic_cast<const CLI::RequiredError*>(&error))
    return fmt::format("{}: expected a command: {} (--help describes them)", name, fmt::join(commands, ", "));
  const std::string what = error.what();
  if (what.ends_with(" missing"))  // "--threads: 1 required N missing"
    return fmt::format("{}: {}: expected a value", name, what.substr(0, what.find(':')));
  return fmt::format("{}: {}", name, what);
}

}  // namespace flash_attn::cli
