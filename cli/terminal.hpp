// What the subcommands share towards the person: tables, colours (on a terminal only), and the --json option.
#pragma once

#include <CLI/CLI.hpp>

#include <memory>
#include <string>
#include <vector>

#include "json.hpp"

namespace flash_attn::cli {

enum class Colour { none, green, red, yellow, dim, bold };

/// True if standard output is a terminal and NO_COLOR is unset.
bool colours();
/// `text` in that colour, or as it is where there are no colours.
std::string painted(const std::string& text, Colour colour);

/// Columns as wide as their widest cell; numbers to the right where asked.
class Table {
 public:
  struct Cell {
    std::string text;
    Colour colour = Colour::none;
    Cell(std::string t, Colour c = Colour::none) : text(std::move(t)), colour(c) {}
    Cell(const char* t) : text(t) {}
  };

  /// A leading '>' in a heading aligns its column to the right.
  explicit Table(const std::vector<std::string>& headings);
  void add(std::vector<Cell> row) { rows_.push_back(std::move(row)); }
  void print() const;

 private:
  std::vector<std::string> headings_;
  std::vector<bool> right_;
  std::vector<std::vector<Cell>> rows_;
};

/// `--json [FILE]`: to the file, or to standard output in place of the tables.
class JsonOption {
 public:
  static std::shared_ptr<JsonOption> add_to(CLI::App& command);
  bool wanted() const { return option_->count() > 0; }
  /// Whether the tables are to be printed: unless the JSON takes their place.
  bool tables() const { return !wanted() || !path_.empty(); }
  void write(const Json& json) const;

 private:
  std::string path_;
  CLI::Option* option_ = nullptr;
};

/// "32 KiB", "1 MiB".
std::string bytes_text(double bytes);

}  // namespace flash_attn::cli
