// Backends written in Python: their registration, and the Problem as they see it.
#pragma once

#include <nanobind/nanobind.h>

namespace flash_attn::python {

/// The class Problem, and the function register_hosted.
void add_hosted(nanobind::module_& m);

}  // namespace flash_attn::python
