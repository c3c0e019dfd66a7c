#include "json.hpp"

#include <fmt/format.h>

#include <cmath>

namespace flash_attn::cli {
namespace {

std::string quoted(std::string_view s) {
  std::string out = "\"";
  for (const char c : s) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\t': out += "\\t"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
        } else {
          out += c;
        }
    }
  }
  return out + '"';
}

std::string joined(const std::vector<std::string>& items, char open, char close, bool one_per_line) {
  std::string out(1, open);
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i) out += one_per_line ? "," : ", ";
    if (one_per_line) out += "\n ";
    out += items[i];
  }
  if (one_per_line && !items.empty()) out += '\n';
  return out + close;
}

}  // namespace

Json::Json(std::string_view value) : text_(quoted(value)) {}

Json::Json(double value) : text_(std::isfinite(value) ? fmt::format("{:.6g}", value) : "null") {}

Json::Json(const std::vector<std::string>& values) {
  std::vector<std::string> items;
  for (const auto& v : values) items.push_back(quoted(v));
  text_ = joined(items, '[', ']', false);
}

Json Json::array(const std::vector<Json>& values, bool one_per_line) {
  std::vector<std::string> items;
  for (const auto& v : values) items.push_back(v.text_);
  Json json;
  json.text_ = joined(items, '[', ']', one_per_line);
  return json;
}

Json Json::object(const Members& members, bool one_per_line) {
  std::vector<std::string> items;
  for (const auto& [key, value] : members) items.push_back(quoted(key) + ": " + value.text_);
  Json json;
  json.text_ = joined(items, '{', '}', one_per_line);
  return json;
}

}  // namespace flash_attn::cli
