// Attention as XLA calls it, so that JAX runs it inside compiled programs (flash_attn/jax.py).
#pragma once

#include <nanobind/nanobind.h>

namespace flash_attn::python {

/// {name of the target: capsule of its handler}, as jax.ffi.register_ffi_target takes them.
nanobind::dict xla_handlers();

}  // namespace flash_attn::python
