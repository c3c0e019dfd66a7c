// What layers do to rows beside attention, on the CPU: for flash_attn.ops.
#pragma once

#include <nanobind/nanobind.h>

namespace flash_attn::python {

void add_row_operations(nanobind::module_& m);

}  // namespace flash_attn::python
