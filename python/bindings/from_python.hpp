// Python objects to the types of the C++ API. The messages name the argument, as the core's do.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <vector>

#include "dlpack.hpp"
#include "flash_attn/flash_attn.hpp"

namespace flash_attn::python {

namespace nb = nanobind;

/// Keeps alive what the fallback way of `tensor` borrows from, until the call is over.
using Owners = std::vector<nb::object>;

/// What a tensor is expected to hold: floating-point numbers, those that a call writes, int32 indices, or the two int64
/// of a dropout state.
enum class Holds { numbers, results, table, state };

/// None: absent. Else any object of a type with DLPack's C exchange table (torch >= 2.10: no Python is run), or with
/// `__dlpack__` (of its `detach()`, if it has one: a producer refuses to export what records gradients).
Tensor tensor(nb::handle object, const char* name, Owners& owners, Holds holds = Holds::numbers);

/// The exchange table of the object's type, or nullptr (torch < 2.10, NumPy).
const dlpack::ExchangeApi* exchange_api(nb::handle object);

// Whatever converts to a number: ints, floats, NumPy scalars, 0-dimensional tensors.
double number(nb::handle object, const char* name);
int64_t integer(nb::handle object, const char* name);
/// An integer that is not negative.
int64_t length(nb::handle object, const char* name);

}  // namespace flash_attn::python
