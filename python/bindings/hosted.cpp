#include "hosted.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "core/append.hpp"
#include "core/check.hpp"
#include "core/dropout.hpp"
#include "core/hosted.hpp"
#include "core/problem.hpp"

namespace flash_attn::python {
namespace {

namespace nb = nanobind;

/// Read-only properties; flash_attn/_engines/__init__.py documents them.
void add_problem(nb::module_& m) {
  const auto dropped = [](const Problem& p) { return DropoutRule(p.scores.dropout); };
  nb::class_<Problem>(m, "Problem",
                      "A checked call, as the core normalised it. Contents of tables on a device are not known.")
      .def("__repr__", [](const Problem& p) { return "<Problem: " + describe(p) + ">"; })
      .def("uses",
           [](const Problem& p, const std::string& feature) {
             for (std::size_t i = 0; i < kFeatures; ++i)
               if (kFeatureNames[i] == feature) return (p.features >> i & 1) != 0;
             throw Error(ErrorCode::invalid_argument,
                         "feature: expected one of " + join(kFeatureNames) + ", got \"" + feature + "\"");
           })
      .def_prop_ro("is_backward", [](const Problem& p) { return p.pass == Pass::backward; })
      .def_prop_ro("dtype", [](const Problem& p) { return name_of(p.dtype); })
      .def_prop_ro("features", [](const Problem& p) { return p.features; })
      .def_prop_ro("batch", [](const Problem& p) { return p.batch; })
      .def_prop_ro("nheads", [](const Problem& p) { return p.nheads; })
      .def_prop_ro("nheads_k", [](const Problem& p) { return p.nheads_k; })
      .def_prop_ro("group", [](const Problem& p) { return p.group(); })
      .def_prop_ro("headdim", [](const Problem& p) { return p.headdim; })
      .def_prop_ro("headdim_v", [](const Problem& p) { return p.headdim_v; })
      .def_prop_ro("max_seqlen_q", [](const Problem& p) { return p.max_seqlen_q; })
      .def_prop_ro("max_seqlen_k", [](const Problem& p) { return p.max_seqlen_k; })
      .def_prop_ro("batch_q", [](const Problem& p) { return p.batch_q; })
      .def_prop_ro("rows_q", [](const Problem& p) { return p.rows_q; })
      .def_prop_ro("batch_k", [](const Problem& p) { return p.batch_k; })
      .def_prop_ro("rows_k", [](const Problem& p) { return p.rows_k; })
      .def_prop_ro("seqlen_q", [](const Problem& p) { return p.sequences.seqlen_q; })
      .def_prop_ro("seqlen_k", [](const Problem& p) { return p.sequences.seqlen_k; })
      .def_prop_ro("page_size", [](const Problem& p) { return p.sequences.page_size; })
      .def_prop_ro("used_k", [](const Problem& p) { return p.sequences.used_k; })
      .def_prop_ro("seqlen_new", [](const Problem& p) { return p.sequences.seqlen_new; })
      .def_prop_ro("rows_new", [](const Problem& p) { return p.append.rows; })
      .def_prop_ro("max_new", [](const Problem& p) { return p.append.max_rows; })
      .def_prop_ro("scale", [](const Problem& p) { return p.scores.scale; })
      .def_prop_ro("softcap", [](const Problem& p) { return p.scores.softcap; })
      .def_prop_ro("window_left", [](const Problem& p) { return p.scores.mask.window_left; })
      .def_prop_ro("window_right", [](const Problem& p) { return p.scores.mask.window_right; })
      .def_prop_ro("chunk", [](const Problem& p) { return p.scores.mask.chunk; })
      .def_prop_ro("causal", [](const Problem& p) { return (p.features & bit(Feature::causal)) != 0; })
      .def_prop_ro("dropout_p", [](const Problem& p) { return p.scores.dropout.p; })
      .def_prop_ro("drop_threshold", [=](const Problem& p) { return dropped(p).threshold; })
      .def_prop_ro("drop_scale", [=](const Problem& p) { return dropped(p).scale; })
      .def_prop_ro("seed", [](const Problem& p) { return p.scores.dropout.seed; })
      .def_prop_ro("offset", [](const Problem& p) { return p.scores.dropout.offset; })
      .def_prop_ro("rotary_dim", [](const Problem& p) { return p.append.rotary_dim; })
      .def_prop_ro("rotary_interleaved", [](const Problem& p) { return p.append.interleaved; })
      .def_prop_ro("deterministic", [](const Problem& p) { return p.run.deterministic; })
      .def_prop_ro("empty_lse", [](const Problem& p) { return p.empty_lse(); })
      .def_prop_ro("device_type", [](const Problem& p) { return p.device.type; })
      .def_prop_ro("device_index", [](const Problem& p) { return p.device.index; })
      .def_prop_ro("recordable", [](const Problem&) { return false; })
      .def_prop_ro("stream", [](const Problem& p) { return reinterpret_cast<uintptr_t>(p.run.stream); });
}

DType dtype_named(const std::string& name) {
  for (const DType t : {DType::f16, DType::bf16, DType::f32, DType::f64})
    if (name == name_of(t)) return t;
  throw Error(ErrorCode::invalid_argument,
              "dtypes: expected float16, bfloat16, float32 or float64, got \"" + name + "\"");
}

Feature feature_named(const std::string& name) {
  for (std::size_t i = 0; i < kFeatures; ++i)
    if (name == kFeatureNames[i]) return static_cast<Feature>(i);
  throw Error(ErrorCode::invalid_argument,
              "serves: expected features among " + join(kFeatureNames) + ", got \"" + name + "\"");
}

/// None, or (dtypes, features, max_headdim, headdim_multiple, {feature: words}).
std::optional<Serves> serves(nb::handle given) {
  if (given.is_none()) return {};
  Serves result{.max_headdim = nb::cast<int64_t>(given[2]), .headdim_multiple = nb::cast<int64_t>(given[3])};
  for (const nb::handle name : nb::object(given[0])) result.dtypes |= bit(dtype_named(nb::cast<std::string>(name)));
  for (const nb::handle name : nb::object(given[1])) result.features |= bit(feature_named(nb::cast<std::string>(name)));
  for (const auto& [name, text] : nb::cast<nb::dict>(given[4]))
    result.words.emplace_back(feature_named(nb::cast<std::string>(name)), nb::cast<std::string>(text));
  return result;
}

void register_engine(const std::string& name, const std::string& description, const std::vector<int32_t>& devices,
                     nb::handle forward, nb::handle backward, bool automatic, const std::string& unavailable,
                     const std::string& before) {
  register_hosted({.name = name,
                   .description = description,
                   .devices = devices,
                   .forward = serves(forward),
                   .backward = serves(backward),
                   .automatic = automatic,
                   .unavailable = unavailable},
                  before);
}

}  // namespace

void add_hosted(nb::module_& m) {
  add_problem(m);
  m.def("register_hosted", &register_engine, nb::arg("name"), nb::arg("description"), nb::arg("devices"),
        nb::arg("forward").none(), nb::arg("backward").none(), nb::arg("automatic"), nb::arg("unavailable"),
        nb::arg("before"));
}

}  // namespace flash_attn::python
