// The library's errors as Python's exceptions, in the words of Python's arguments.
#pragma once

#include <nanobind/nanobind.h>

#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace flash_attn::python {

using Names = std::span<const std::pair<std::string_view, std::string_view>>;  // the core's, Python's

/// The arguments of flash_attn_with_kvcache.
extern const Names kCacheNames;

/// `message` with every word that has another name replaced by it.
std::string renamed(const std::string& message, Names names);

/// Adds the exception classes to the module and translates flash_attn::Error into them.
void add_errors(nanobind::module_& m);

}  // namespace flash_attn::python
