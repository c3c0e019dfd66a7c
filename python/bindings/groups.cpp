#include "groups.hpp"

#include <span>

namespace flash_attn::python {
namespace {

template <class Group>
struct Field {
  const char* name;
  void (*read)(nb::handle value, const char* label, Group& group, Owners& owners);
  const char* label = nullptr;  // in messages; nullptr: the name
};

template <class Member>
struct Of;
template <class Group, class Value>
struct Of<Value Group::*> {
  using type = Group;
};
template <auto member>
using GroupOf = typename Of<decltype(member)>::type;

bool truth(nb::handle object) {
  const int value = PyObject_IsTrue(object.ptr());
  if (value < 0) nb::raise_python_error();
  return value != 0;
}

// How a value becomes a member of its group.
template <auto member, Holds holds = Holds::numbers>
void to_tensor(nb::handle x, const char* label, GroupOf<member>& group, Owners& owners) {
  group.*member = tensor(x, label, owners, holds);
}
template <auto member>
void to_table(nb::handle x, const char* label, GroupOf<member>& group, Owners& owners) {
  group.*member = tensor(x, label, owners, Holds::table);
}
template <auto member>
void to_number(nb::handle x, const char* label, GroupOf<member>& group, Owners&) {
  group.*member = number(x, label);
}
template <auto member>
void to_integer(nb::handle x, const char* label, GroupOf<member>& group, Owners&) {
  group.*member = integer(x, label);
}
template <auto member>
void to_length(nb::handle x, const char* label, GroupOf<member>& group, Owners&) {
  group.*member = length(x, label);
}
template <auto member>
void to_truth(nb::handle x, const char*, GroupOf<member>& group, Owners&) {
  group.*member = truth(x);
}
template <auto member>
void to_string(nb::handle x, const char*, GroupOf<member>& group, Owners&) {
  group.*member = nb::cast<std::string>(x);
}

constexpr Field<Sequences> kSequences[] = {
    {"cu_seqlens_q", to_table<&Sequences::cu_seqlens_q>},
    {"cu_seqlens_k", to_table<&Sequences::cu_seqlens_k>},
    {"max_seqlen_q", to_length<&Sequences::max_seqlen_q>},
    {"max_seqlen_k", to_length<&Sequences::max_seqlen_k>},
    {"seqused_q", to_table<&Sequences::seqused_q>},
    {"seqused_k", to_table<&Sequences::seqused_k>},
    {"used_k", to_length<&Sequences::used_k>},
    {"leftpad_k", to_table<&Sequences::leftpad_k>},
    {"cache_batch_idx", to_table<&Sequences::cache_batch_idx>},
    {"block_table", to_table<&Sequences::block_table>},
};

constexpr Field<Scores> kScores[] = {
    {"softmax_scale", to_number<&Scores::softmax_scale>},
    {"causal", to_truth<&Scores::causal>},
    {"window_size_left", to_integer<&Scores::window_left>, "window_size[0]"},
    {"window_size_right", to_integer<&Scores::window_right>, "window_size[1]"},
    {"softcap", to_number<&Scores::softcap>},
    {"alibi_slopes", to_tensor<&Scores::alibi_slopes>},
    {"learnable_sink", to_tensor<&Scores::sink>},
    {"attn_bias", to_tensor<&Scores::bias>},
    {"attention_chunk", to_integer<&Scores::attention_chunk>},
};

constexpr Field<Dropout> kDropout[] = {
    {"dropout_p", to_number<&Dropout::p>},
    {"rng_state", to_tensor<&Dropout::state, Holds::state>},
};

constexpr Field<Run> kRun[] = {
    {"backend", to_string<&Run::backend>},
    {"prefer", to_string<&Run::prefer>},
    {"deterministic", to_truth<&Run::deterministic>},
    {"differentiable", to_truth<&Run::differentiable>},
    {"positive_empty_lse", to_truth<&Run::positive_empty_lse>},
};

constexpr Field<NewKeys> kNewKeys[] = {
    {"k", to_tensor<&NewKeys::k>, "new_keys.k"},
    {"v", to_tensor<&NewKeys::v>, "new_keys.v"},
    {"cu_seqlens", to_table<&NewKeys::cu_seqlens>, "new_keys.cu_seqlens"},
};

constexpr Field<Rotary> kRotary[] = {
    {"cos", to_tensor<&Rotary::cos>, "rotary.cos"},
    {"sin", to_tensor<&Rotary::sin>, "rotary.sin"},
    {"interleaved", to_truth<&Rotary::interleaved>},
    {"positions", to_table<&Rotary::positions>, "rotary.positions"},
};

template <class Group, std::size_t n>
void read_fields(nb::handle group, const Field<Group> (&fields)[n], Group& target, Owners& owners) {
  if (group.is_none()) return;
  if (!PyTuple_Check(group.ptr()) || PyTuple_Size(group.ptr()) != static_cast<Py_ssize_t>(n))
    throw Error(ErrorCode::internal, std::string("expected the group of ") + fields[0].name + ", a tuple of " +
                                         std::to_string(n) + " values");
  for (std::size_t i = 0; i < n; ++i) {
    const nb::handle value = PyTuple_GetItem(group.ptr(), static_cast<Py_ssize_t>(i));
    if (!value.is_none()) fields[i].read(value, fields[i].label ? fields[i].label : fields[i].name, target, owners);
  }
}

template <class Group, std::size_t n>
nb::tuple names_of(const Field<Group> (&fields)[n]) {
  nb::list names;
  for (const Field<Group>& field : fields) names.append(field.name);
  return nb::tuple(names);
}

}  // namespace

void read(nb::handle group, Sequences& sequences, Owners& owners) { read_fields(group, kSequences, sequences, owners); }
void read(nb::handle group, Scores& scores, Owners& owners) { read_fields(group, kScores, scores, owners); }
void read(nb::handle group, Dropout& dropout, Owners& owners) { read_fields(group, kDropout, dropout, owners); }
void read(nb::handle group, Run& run, Owners& owners) { read_fields(group, kRun, run, owners); }
void read(nb::handle group, NewKeys& keys, Owners& owners) { read_fields(group, kNewKeys, keys, owners); }
void read(nb::handle group, Rotary& rotary, Owners& owners) { read_fields(group, kRotary, rotary, owners); }

nb::dict group_fields() {
  nb::dict all;
  all["Sequences"] = names_of(kSequences);
  all["Scores"] = names_of(kScores);
  all["Dropout"] = names_of(kDropout);
  all["Run"] = names_of(kRun);
  all["NewKeys"] = names_of(kNewKeys);
  all["Rotary"] = names_of(kRotary);
  return all;
}

}  // namespace flash_attn::python
