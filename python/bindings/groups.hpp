// The groups of arguments that every entry of the module takes (flash_attn/_call.py): tuples, read by position.
//
// A group's table of fields is the one place in C++ where its order stands. The Python side compares its own with
// `group_fields` when it is imported.
#pragma once

#include "from_python.hpp"

namespace flash_attn::python {

// None, or the tuple of a group: fields that are None keep their defaults.
void read(nb::handle group, Sequences& sequences, Owners& owners);
void read(nb::handle group, Scores& scores, Owners& owners);
void read(nb::handle group, Dropout& dropout, Owners& owners);
void read(nb::handle group, Run& run, Owners& owners);
void read(nb::handle group, NewKeys& keys, Owners& owners);
void read(nb::handle group, Rotary& rotary, Owners& owners);

/// {"Sequences": ("cu_seqlens_q", ...), ...}
nb::dict group_fields();

}  // namespace flash_attn::python
