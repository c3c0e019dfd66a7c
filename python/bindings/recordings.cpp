#include "recordings.hpp"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/driver/driver.hpp"
#include "dlpack.hpp"

namespace flash_attn::python {
namespace {

namespace nb = nanobind;

constexpr int32_t kCuda = 2;  // DLDeviceType

Recordings& recordings() {
  static Recordings all;
  return all;
}

/// For tests on machines without a GPU: every launch becomes a call in Python.
class PythonLauncher final : public Launcher {
 public:
  explicit PythonLauncher(nb::object function) : function_(std::move(function)) {}
  const void* context() const override { return this; }
  void launch(const Launch& kernel, uint64_t* values, void* stream) const override {
    const nb::gil_scoped_acquire interpreter;
    nb::list parameters;
    for (std::size_t i = 0; i < kernel.parameters.size(); ++i) parameters.append(values[i]);
    function_(kernel.function, kernel.programs, kernel.threads, kernel.shared_bytes,
              reinterpret_cast<uintptr_t>(stream), parameters);
  }

 private:
  nb::object function_;
};

/// Not destroyed at exit, when the interpreter is gone.
std::unique_ptr<PythonLauncher>& substitute() {
  static auto& launcher = *new std::unique_ptr<PythonLauncher>;
  return launcher;
}

const Launcher& launcher() {
  if (substitute()) return *substitute();
  return cuda::driver();
}

void launch_by(nb::object function) {
  recordings().clear();
  substitute() = function.is_none() ? nullptr : std::make_unique<PythonLauncher>(std::move(function));
}

/// A tensor by its name, an offset in the workspace as an int, or the bytes of a number.
Parameter parameter(nb::handle given, int64_t workspace_bytes) {
  if (PyBytes_Check(given.ptr())) {
    Parameter p;
    const auto size = static_cast<std::size_t>(PyBytes_Size(given.ptr()));
    if (size > sizeof p.value)
      throw Error(ErrorCode::invalid_argument,
                  "parameters: expected numbers of at most 8 bytes, got " + std::to_string(size));
    std::memcpy(&p.value, PyBytes_AsString(given.ptr()), size);
    return p;
  }
  if (PyLong_Check(given.ptr())) {
    const int64_t offset = nb::cast<int64_t>(given);
    if (offset < 0 || offset >= workspace_bytes)
      throw Error(ErrorCode::invalid_argument, "parameters: expected an offset within the workspace of " +
                                                   std::to_string(workspace_bytes) + " bytes, got " +
                                                   std::to_string(offset));
    return {Parameter::Kind::workspace, static_cast<uint64_t>(offset)};
  }
  const auto name = nb::cast<std::string>(given);
  const auto found = std::find(kRoleNames.begin(), kRoleNames.end(), name);
  if (found == kRoleNames.end())
    throw Error(ErrorCode::invalid_argument, "parameters: expected the name of a tensor, got \"" + name + "\"");
  return {Parameter::Kind::tensor, static_cast<uint64_t>(found - kRoleNames.begin())};
}

void record(const HostedCall& call, nb::list launches, int64_t workspace_bytes) {
  if (call.key.empty()) throw Error(ErrorCode::invalid_argument, "record: this call is not recordable");
  const void* const context = launcher().context();
  if (const auto known = recordings().find(call.key); known && known->context == context)
    return;  // it could not be launched just now, from where the call came
  Recording recording{.backend = call.backend, .workspace_bytes = workspace_bytes, .context = context};
  for (const nb::handle given : launches) {
    Launch launch{.function = nb::cast<uint64_t>(given[0]),
                  .programs = nb::cast<uint32_t>(given[1]),
                  .threads = nb::cast<uint32_t>(given[2]),
                  .shared_bytes = nb::cast<uint32_t>(given[3])};
    for (const nb::handle p : nb::object(given[4])) launch.parameters.push_back(parameter(p, workspace_bytes));
    recording.launches.push_back(std::move(launch));
  }
  recordings().add(call.key, std::move(recording));
}

}  // namespace

bool records(Device device) {
  if (device.type != kCuda) return false;
  return substitute() || cuda::driver().loaded();
}

std::shared_ptr<const Recording> launch_recorded(const CallKey& key, const Problem& problem) {
  auto recording = recordings().find(key.bytes);
  if (!recording) return nullptr;
  const nb::gil_scoped_release free_interpreter;  // a full queue makes the driver wait
  return replay(*recording, launcher(), key, problem.device, problem.run) ? recording : nullptr;
}

void add_recordings(nb::module_& m) {
  nb::class_<HostedCall, Problem>(m, "HostedCall", "A Problem that is for an engine to run.")
      .def_prop_ro("recordable", [](const HostedCall& call) { return !call.key.empty(); })
      .def("record", &record, nb::arg("launches"), nb::arg("workspace_bytes") = 0,
           "Hands over what was launched: [(function, programs, threads, shared_bytes, parameters)].");
  m.def("forget_recordings", [] { recordings().clear(); });
  m.def("recordings", [] { return recordings().size(); });
  m.def("launch_by", &launch_by, nb::arg("function").none());
}

}  // namespace flash_attn::python
