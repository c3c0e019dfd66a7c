#include "terminal.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "flash_attn/error.hpp"

namespace flash_attn::cli {

bool colours() {
  static const bool yes = isatty(STDOUT_FILENO) && !std::getenv("NO_COLOR");
  return yes;
}

std::string painted(const std::string& text, Colour colour) {
  static constexpr const char* kCodes[] = {"", "32", "31", "33", "2", "1"};
  if (colour == Colour::none || !colours()) return text;
  return fmt::format("\033[{}m{}\033[0m", kCodes[static_cast<int>(colour)], text);
}

Table::Table(const std::vector<std::string>& headings) {
  for (const auto& h : headings) {
    right_.push_back(h.starts_with('>'));
    headings_.push_back(right_.back() ? h.substr(1) : h);
  }
}

void Table::print() const {
  std::vector<std::size_t> width;
  for (const auto& h : headings_) width.push_back(h.size());
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size() && i < width.size(); ++i) width[i] = std::max(width[i], row[i].text.size());
  }
  const auto print_row = [&](const std::vector<Cell>& row) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string pad(width[i] - row[i].text.size(), ' ');
      const std::string text = painted(row[i].text, row[i].colour);
      if (i) line += "  ";
      line += right_[i] ? pad + text : text + (i + 1 < row.size() ? pad : "");
    }
    fmt::print("{}\n", line);
  };
  std::vector<Cell> head;
  for (const auto& h : headings_) head.emplace_back(h, Colour::bold);
  print_row(head);
  for (const auto& row : rows_) print_row(row);
}

std::shared_ptr<JsonOption> JsonOption::add_to(CLI::App& command) {
  auto json = std::make_shared<JsonOption>();
  json->option_ =
      command.add_option("--json", json->path_, "Write JSON to FILE, or to standard output in place of tables")
          ->type_name("[FILE]")
          ->expected(0, 1);
  return json;
}

void JsonOption::write(const Json& json) const {
  if (!wanted()) return;
  if (path_.empty()) {
    fmt::print("{}\n", json.text());
    return;
  }
  std::FILE* file = std::fopen(path_.c_str(), "w");
  const bool good = file && std::fprintf(file, "%s\n", json.text().c_str()) > 0;
  if ((file && std::fclose(file) != 0) || !good) {
    throw Error(ErrorCode::invalid_argument, fmt::format("--json: cannot write {}", path_));
  }
}

std::string bytes_text(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 5) bytes /= 1024, ++unit;
  return fmt::format("{:.4g} {}", bytes, kUnits[unit]);
}

}  // namespace flash_attn::cli
