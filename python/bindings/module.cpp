// flash_attn._C: the C++ API for Python. Tensors are positional; everything else comes in groups (groups.hpp).
//
// A call costs about as much as its arguments: tensors are borrowed through DLPack (from_python.hpp), nothing is
// allocated on the way, and the interpreter is free while the CPU's kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <initializer_list>
#include <new>
#include <string>
#include <vector>

#include "core/backend.hpp"
#include "core/problem.hpp"
#include "core/work.hpp"
#include "device.hpp"
#include "errors.hpp"
#include "flash_attn/flash_attn.hpp"
#include "from_python.hpp"
#include "groups.hpp"
#include "host_threads.hpp"
#include "hosted.hpp"
#include "recordings.hpp"
#include "row_operations.hpp"
#include "xla_handlers.hpp"

namespace flash_attn::python {
namespace {

/// What all calls have besides tensors: None, or a tuple each.
struct Groups {
  nb::handle sequences, scores, dropout, run;

  template <class Call>
  void fill(Call& call, Owners& owners) const {
    read(sequences, call.sequences, owners);
    read(scores, call.scores, owners);
    read(dropout, call.dropout, owners);
    read(run, call.run, owners);
  }
};

struct ForwardCall {
  Owners owners;
  Forward call;

  ForwardCall(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse, const Groups& groups,
              nb::handle new_keys, nb::handle rotary) {
    call.q = tensor(q, "q", owners);
    const bool joins = !new_keys.is_none() && !nb::object(new_keys[0]).is_none();
    const Holds cached = joins ? Holds::results : Holds::numbers;
    call.k = tensor(k, "k", owners, cached);
    call.v = tensor(v, "v", owners, cached);
    call.out = tensor(out, "out", owners, Holds::results);
    call.lse = tensor(lse, "softmax_lse", owners, Holds::results);
    groups.fill(call, owners);
    read(new_keys, call.new_keys, owners);
    read(rotary, call.rotary, owners);
  }
};

struct BackwardCall {
  Owners owners;
  Backward call;

  BackwardCall(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse, nb::handle dq,
               nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias, nb::handle dsink,
               const Groups& groups) {
    call.dout = tensor(dout, "dout", owners);
    call.q = tensor(q, "q", owners);
    call.k = tensor(k, "k", owners);
    call.v = tensor(v, "v", owners);
    call.out = tensor(out, "out", owners);
    call.lse = tensor(lse, "softmax_lse", owners);
    call.dq = tensor(dq, "dq", owners, Holds::results);
    call.dk = tensor(dk, "dk", owners, Holds::results);
    call.dv = tensor(dv, "dv", owners, Holds::results);
    call.dlse = tensor(dlse, "dlse", owners);
    call.dbias = tensor(dbias, "dbias", owners, Holds::results);
    call.dsink = tensor(dsink, "dsink", owners, Holds::results);
    groups.fill(call, owners);
  }
};

std::vector<Veto> vetoes(nb::handle given) {
  std::vector<Veto> list;
  if (given.is_none()) return list;
  for (const nb::handle veto : given) list.push_back({nb::cast<std::string>(veto[0]), nb::cast<std::string>(veto[1])});
  return list;
}

void run_natively(const Backend& backend, const Problem& problem) {
  nb::gil_scoped_release free_interpreter;
  if (problem.device.is_cpu()) follow_host_threads();
  problem.pass == Pass::forward ? backend.forward(problem) : backend.backward(problem);
}

/// The name of the backend that served the call; or, where it is hosted, (name, HostedCall) for Python to run, unless
/// it has recorded what it launches.
template <class Call>
nb::object run(Call& call, nb::handle q, nb::handle veto) {
  DeviceServices services(q, call.q.device);
  services.offer(call.run);
  try {
    Problem problem = make_problem(call);
    CallKey key;
    if (records(problem.device) && veto.is_none()) {  // what follows a veto is not known by the key alone
      key = key_of(call);
      if (const auto recorded = launch_recorded(key, problem))
        return nb::str(recorded->backend.data(), recorded->backend.size());
    }
    const Backend& backend = choose_or_throw(problem, vetoes(veto));
    const bool nothing = problem.writes_nothing(), hosted = backend.hosted();
    if (!nothing && !hosted) run_natively(backend, problem);
    nb::str name(backend.name().data(), backend.name().size());
    if (nothing || !hosted) return name;
    return nb::make_tuple(name,
                          nb::cast(HostedCall{std::move(problem), std::string(backend.name()), std::move(key.bytes)}));
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, "out of memory");
  }
}

nb::object py_forward(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse, nb::handle sequences,
                      nb::handle scores, nb::handle dropout, nb::handle run_group, nb::handle new_keys,
                      nb::handle rotary, nb::handle veto, bool cache) {
  if (!cache) {
    ForwardCall f(q, k, v, out, lse, {sequences, scores, dropout, run_group}, new_keys, rotary);
    return run(f.call, q, veto);
  }
  try {
    return py_forward(q, k, v, out, lse, sequences, scores, dropout, run_group, new_keys, rotary, veto, false);
  } catch (const Error& e) {
    throw Error(e.code(), renamed(e.what(), kCacheNames));
  }
}

nb::object py_backward(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                       nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias, nb::handle dsink,
                       nb::handle sequences, nb::handle scores, nb::handle dropout, nb::handle run_group,
                       nb::handle veto) {
  BackwardCall b(dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, {sequences, scores, dropout, run_group});
  return run(b.call, q, veto);
}

/// (problem, [(backend, chosen, why_not)], plan, Problem, work)
template <class Call>
nb::tuple to_python(const Call& call, nb::handle veto) {
  const Problem problem = make_problem(call);
  const Choice choice = choose(problem, vetoes(veto));
  nb::list candidates;
  for (const Candidate& c : choice.candidates) candidates.append(nb::make_tuple(c.backend, c.chosen, c.why_not));
  return nb::make_tuple(describe(problem), candidates, choice.backend ? choice.backend->plan(problem) : std::string(),
                        nb::cast(problem), describe(count_work(problem)));
}

nb::tuple py_explain_forward(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                             nb::handle sequences, nb::handle scores, nb::handle dropout, nb::handle run_group,
                             nb::handle new_keys, nb::handle rotary, nb::handle veto) {
  return to_python(ForwardCall(q, k, v, out, lse, {sequences, scores, dropout, run_group}, new_keys, rotary).call,
                   veto);
}

nb::tuple py_explain_backward(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                              nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias,
                              nb::handle dsink, nb::handle sequences, nb::handle scores, nb::handle dropout,
                              nb::handle run_group, nb::handle veto) {
  return to_python(
      BackwardCall(dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, {sequences, scores, dropout, run_group})
          .call,
      veto);
}

/// Says that tensors lie on the CPU, each in memory of its own: a device's handles (Metal) are no addresses, and side
/// by side they would look like tensors that overlap.
void on_cpu(std::initializer_list<Tensor*> tensors) {
  constexpr uintptr_t kApart = uintptr_t{1} << 56;  // more than any tensor spans
  uintptr_t place = kApart;
  for (Tensor* t : tensors) {
    t->device = {};
    t->data = reinterpret_cast<void*>(place);
    place += kApart;
  }
}
void on_cpu(Forward& call) {
  on_cpu({&call.q, &call.k, &call.v, &call.out, &call.lse, &call.new_keys.k, &call.new_keys.v, &call.rotary.cos,
          &call.rotary.sin, &call.scores.alibi_slopes, &call.scores.bias, &call.scores.sink});
}
void on_cpu(Backward& call) {
  on_cpu({&call.q, &call.k, &call.v, &call.out, &call.lse, &call.dout, &call.dq, &call.dk, &call.dv, &call.dlse,
          &call.dbias, &call.dsink, &call.scores.alibi_slopes, &call.scores.bias, &call.scores.sink});
}

/// Checks a call on a device whose tables were copied to the CPU, with the CPU's messages. Of a call's memory the
/// checks read the tables only; where all else lies is checked by the call itself.
template <class Call>
void check_contents(Call& call) {
  on_cpu(call);
  call.dropout.state = {};
  make_problem(call);
}

void py_check_forward(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse, nb::handle sequences,
                      nb::handle scores, nb::handle dropout, nb::handle run_group, nb::handle new_keys,
                      nb::handle rotary, bool cache) {
  try {
    ForwardCall f(q, k, v, out, lse, {sequences, scores, dropout, run_group}, new_keys, rotary);
    check_contents(f.call);
  } catch (const Error& e) {
    throw Error(e.code(), cache ? renamed(e.what(), kCacheNames) : std::string(e.what()));
  }
}

void py_check_backward(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                       nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias, nb::handle dsink,
                       nb::handle sequences, nb::handle scores, nb::handle dropout, nb::handle run_group) {
  BackwardCall b(dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, {sequences, scores, dropout, run_group});
  check_contents(b.call);
}

/// (name, description, unavailable, devices, forward, backward); the last two: None, or ([dtype], [feature],
/// max_headdim, headdim_multiple).
nb::list py_backends() {
  const auto capabilities = [](const Serves* s, Features never) -> nb::object {
    if (!s) return nb::none();
    nb::list dtypes, features;
    for (const DType t : {DType::f16, DType::bf16, DType::f32, DType::f64})
      if (s->dtypes & bit(t)) dtypes.append(name_of(t));
    for (std::size_t i = 0; i < kFeatures; ++i)
      if ((s->features & ~never) >> i & 1) features.append(nb::str(kFeatureNames[i].data(), kFeatureNames[i].size()));
    return nb::make_tuple(nb::tuple(dtypes), nb::tuple(features), s->max_headdim, s->headdim_multiple);
  };
  nb::list all;
  for (const Backend* b : registered_backends()) {
    nb::list devices;
    for (const int32_t type : b->devices()) devices.append(type);
    all.append(nb::make_tuple(std::string(b->name()), std::string(b->description()), b->unavailable(),
                              nb::tuple(devices), capabilities(b->serves(Pass::forward), kBackwardOnly),
                              capabilities(b->serves(Pass::backward), kForwardOnly)));
  }
  return all;
}

nb::tuple feature_names() {
  nb::list names;
  for (const std::string_view name : kFeatureNames) names.append(nb::str(name.data(), name.size()));
  return nb::tuple(names);
}

}  // namespace

// None is a value of every argument here (absent), so each is declared to accept it.
#define FA_ARG(name) nb::arg(name).none()
#define FA_GROUPS                                                                                     \
  nb::arg("sequences") = nb::none(), nb::arg("scores") = nb::none(), nb::arg("dropout") = nb::none(), \
  nb::arg("run") = nb::none()
#define FA_FORWARD                                                                        \
  FA_ARG("q"), FA_ARG("k"), FA_ARG("v"), FA_ARG("out"), FA_ARG("softmax_lse"), FA_GROUPS, \
      nb::arg("new_keys") = nb::none(), nb::arg("rotary") = nb::none()
#define FA_BACKWARD                                                                                          \
  FA_ARG("dout"), FA_ARG("q"), FA_ARG("k"), FA_ARG("v"), FA_ARG("out"), FA_ARG("softmax_lse"), FA_ARG("dq"), \
      FA_ARG("dk"), FA_ARG("dv"), FA_ARG("dlse"), FA_ARG("dbias"), FA_ARG("dsink"), FA_GROUPS

NB_MODULE(_C, m) {
  m.doc() = "The compiled core of flash_attn.";
  add_errors(m);
  add_hosted(m);
  add_recordings(m);
  add_row_operations(m);
  m.def("forward", &py_forward, FA_FORWARD, nb::arg("veto") = nb::none(), nb::arg("cache") = false);
  m.def("backward", &py_backward, FA_BACKWARD, nb::arg("veto") = nb::none());
  m.def("explain_forward", &py_explain_forward, FA_FORWARD, nb::arg("veto") = nb::none());
  m.def("explain_backward", &py_explain_backward, FA_BACKWARD, nb::arg("veto") = nb::none());
  m.def("check_forward", &py_check_forward, FA_FORWARD, nb::arg("cache") = false);
  m.def("check_backward", &py_check_backward, FA_BACKWARD);
  m.def("group_fields", &group_fields);
  m.def("backends", &py_backends);
  m.def("feature_names", &feature_names);
  m.def(
      "unregister_backend", [](const std::string& name) { unregister_backend(name); }, nb::arg("name"));
  m.def("workspace_works", &workspace_works, nb::arg("q"), nb::arg("bytes"));
  m.def("version", &version);
  m.def("xla_handlers", &xla_handlers);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isas", &cpu_isas);
  m.def("num_threads", [] {
    follow_host_threads();
    return num_threads();
  });
  m.def("set_num_threads", &choose_num_threads, nb::arg("n"));
  adopt_host_threads();
}

}  // namespace flash_attn::python
