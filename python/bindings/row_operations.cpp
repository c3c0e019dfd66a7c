#include "row_operations.hpp"

#include <type_traits>

#include "cpu/rms_norm.hpp"
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
void run(void (*function)(const Call&), const std::type_identity_t<Call>& call) {
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

/// cpu/rms_norm.hpp says what they are; residual and h may be None.
void py_rms_norm(nb::handle y, nb::handle h, nb::handle rstd, nb::handle x, nb::handle residual, nb::handle weight,
                 double eps, bool zero_centered_weight) {
  Owners owners;
  run(cpu::rms_norm, {.x = on_cpu(x, "x", owners),
                      .residual = on_cpu(residual, "residual", owners),
                      .weight = on_cpu(weight, "weight", owners),
                      .y = on_cpu(y, "y", owners, Holds::results),
                      .h = on_cpu(h, "h", owners, Holds::results),
                      .rstd = on_cpu(rstd, "rstd", owners, Holds::results),
                      .eps = eps,
                      .zero_centered_weight = zero_centered_weight});
}

/// dresidual and dstream may be None.
void py_rms_norm_backward(nb::handle dx, nb::handle dresidual, nb::handle dweight, nb::handle dy, nb::handle dstream,
                          nb::handle h, nb::handle rstd, nb::handle weight, bool zero_centered_weight) {
  Owners owners;
  run(cpu::rms_norm_backward, {.dy = on_cpu(dy, "dy", owners),
                               .dstream = on_cpu(dstream, "dstream", owners),
                               .h = on_cpu(h, "h", owners),
                               .rstd = on_cpu(rstd, "rstd", owners),
                               .weight = on_cpu(weight, "weight", owners),
                               .dx = on_cpu(dx, "dx", owners, Holds::results),
                               .dresidual = on_cpu(dresidual, "dresidual", owners, Holds::results),
                               .dweight = on_cpu(dweight, "dweight", owners, Holds::results),
                               .zero_centered_weight = zero_centered_weight});
}

}  // namespace

void add_row_operations(nb::module_& m) {
  m.def("rotate", &py_rotate, nb::arg("out"), nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("seqlen_offsets"),
        nb::arg("cu_seqlens").none(), nb::arg("interleaved"), nb::arg("conjugate"));
  m.def("rms_norm", &py_rms_norm, nb::arg("y"), nb::arg("h").none(), nb::arg("rstd"), nb::arg("x"),
        nb::arg("residual").none(), nb::arg("weight"), nb::arg("eps"), nb::arg("zero_centered_weight"));
  m.def("rms_norm_backward", &py_rms_norm_backward, nb::arg("dx"), nb::arg("dresidual").none(), nb::arg("dweight"),
        nb::arg("dy"), nb::arg("dstream").none(), nb::arg("h"), nb::arg("rstd"), nb::arg("weight"),
        nb::arg("zero_centered_weight"));
}

}  // namespace flash_attn::python
