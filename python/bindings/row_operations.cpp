#include "row_operations.hpp"

#include "cpu/rotary.hpp"
#include "from_python.hpp"
#include "host_threads.hpp"

namespace flash_attn::python {
namespace {

/// A tensor of the CPU's memory.
Tensor on_cpu(nb::handle object, const char* name, Owners& owners, Holds holds = Holds::numbers) {
  const Tensor t = tensor(object, name, owners, holds);
  if (t.present() && !t.device.is_cpu())
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected a tensor on the CPU");
  return t;
}

template <class Call>
void run(void (*function)(const Call&), const Call& call) {
  nb::gil_scoped_release free_interpreter;
  follow_host_threads();
  function(call);
}

/// cpu/rotary.hpp says what they are; seqlen_offsets: a number or a tensor.
void py_rotate(nb::handle out, nb::handle x, nb::handle cos, nb::handle sin, nb::handle seqlen_offsets,
               nb::handle cu_seqlens, bool interleaved, bool conjugate) {
  Owners owners;
  cpu::RotaryCall call;
  call.x = on_cpu(x, "x", owners);
  call.out = on_cpu(out, "out", owners, Holds::results);
  call.cos = on_cpu(cos, "cos", owners);
  call.sin = on_cpu(sin, "sin", owners);
  call.cu_seqlens = on_cpu(cu_seqlens, "cu_seqlens", owners, Holds::table);
  if (PyLong_Check(seqlen_offsets.ptr()))
    call.offset = integer(seqlen_offsets, "seqlen_offsets");
  else
    call.offsets = on_cpu(seqlen_offsets, "seqlen_offsets", owners, Holds::table);
  call.interleaved = interleaved;
  call.conjugate = conjugate;
  run(cpu::rotate, call);
}

}  // namespace

void add_row_operations(nb::module_& m) {
  m.def("rotate", &py_rotate, nb::arg("out"), nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("seqlen_offsets"),
        nb::arg("cu_seqlens").none(), nb::arg("interleaved"), nb::arg("conjugate"));
}

}  // namespace flash_attn::python
