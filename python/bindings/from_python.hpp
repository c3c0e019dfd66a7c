// Python objects to the types of the C++ API. The messages name the argument, as the core's do.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <vector>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn::python {

namespace nb = nanobind;

/// Keeps alive what the fallback way of `tensor` borrows from, until the call is over.
using Owners = std::vector<nb::object>;

/// None: absent. Else any object of a type with DLPack's C exchange table (torch >= 2.10: no Python is run), or with
/// `__dlpack__` (of its `detach()`, if it has one: a producer refuses to export what records gradients).
Tensor tensor(nb::handle object, const char* name, Owners& owners);

// Whatever converts to a number: ints, floats, NumPy scalars, 0-dimensional tensors.
double number(nb::handle object, const char* name);
int64_t integer(nb::handle object, const char* name);
/// An integer that is not negative.
int64_t length(nb::handle object, const char* name);

}  // namespace flash_attn::python
