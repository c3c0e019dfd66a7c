// Json: a writer for the few shapes that the tool prints: objects, arrays, strings, numbers, booleans, null.
#pragma once

#include <concepts>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace flash_attn::cli {

/// An immutable piece of JSON text. Numbers that are not finite become null: JSON has no word for them.
class Json {
 public:
  using Members = std::vector<std::pair<std::string, Json>>;

  Json() : text_("null") {}
  Json(std::string_view value);
  Json(const std::string& value) : Json(std::string_view(value)) {}
  Json(const char* value) : Json(std::string_view(value)) {}
  Json(double value);
  template <std::same_as<bool> B>
  Json(B value) : text_(value ? "true" : "false") {}
  template <std::integral I>
  requires(!std::same_as<I, bool>) Json(I value) : text_(std::to_string(value)) {}
  Json(const std::vector<std::string>& values);

  static Json array(const std::vector<Json>& items, bool one_per_line = false);
  static Json object(const Members& members, bool one_per_line = false);

  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

}  // namespace flash_attn::cli
