#include "instance.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "dtype.hpp"

namespace flash_attn::cli {
namespace {

using Shape = std::vector<int64_t>;

struct Shapes {
  Shape q, k, v, out, lse, alibi, bias, sink;
};

/// All shapes of a case; empty where it has no such tensor.
Shapes shapes_of(const Case& c) {
  const auto total = [&](const std::vector<int32_t>& lengths) {
    return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}) + c.spare_rows;
  };
  Shapes s;
  const int64_t batch = c.packed() ? static_cast<int64_t>(c.lengths_q.size()) : c.batch;
  const auto rows_q = [&](int64_t d) {
    return c.packed() ? Shape{total(c.lengths_q), c.nheads, d} : Shape{batch, c.seqlen_q, c.nheads, d};
  };
  const auto rows_k = [&](int64_t d) {
    if (c.page_size > 0)
      return Shape{batch * ((c.seqlen_k + c.page_size - 1) / c.page_size) + 1, c.page_size, c.nheads_k, d};
    if (c.packed()) return Shape{total(c.lengths_k), c.nheads_k, d};
    return Shape{c.cache_batch > 0 ? c.cache_batch : batch, c.seqlen_k, c.nheads_k, d};
  };
  s.q = rows_q(c.headdim);
  s.out = rows_q(c.dim_v());
  s.k = rows_k(c.headdim);
  s.v = rows_k(c.dim_v());
  s.lse = c.packed() ? Shape{c.nheads, s.q[0]} : Shape{batch, c.nheads, c.seqlen_q};
  if (c.alibi) s.alibi = c.alibi_per_batch ? Shape{batch, c.nheads} : Shape{c.nheads};
  const int64_t rows = c.packed() ? *std::max_element(c.lengths_q.begin(), c.lengths_q.end()) : c.seqlen_q;
  const int64_t keys = c.lengths_k.empty() ? c.seqlen_k : *std::max_element(c.lengths_k.begin(), c.lengths_k.end());
  if (c.bias == Case::Bias::full) s.bias = {batch, c.nheads, rows, keys};
  if (c.bias == Case::Bias::heads) s.bias = {1, c.nheads, rows, keys};
  if (c.bias == Case::Bias::keys) s.bias = {batch, 1, 1, keys};
  if (c.sink) s.sink = {c.nheads};
  return s;
}

int64_t count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

/// Calls visit(byte offset) for every element, the last dimension fastest.
template <class Visit>
void for_each_element(const Tensor& t, Visit visit) {
  int64_t index[Tensor::kMaxDims]{};
  for (int64_t n = t.numel(); n > 0; --n) {
    int64_t offset = 0;
    for (int d = 0; d < t.ndim; ++d) offset += index[d] * t.stride[d];
    visit(offset * static_cast<int64_t>(size_of(t.dtype)));
    for (int d = t.ndim - 1; d >= 0 && ++index[d] == t.shape[d]; --d) index[d] = 0;
  }
}

template <class T>
T get(const unsigned char* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
void put(unsigned char* p, T x) {
  std::memcpy(p, &x, sizeof x);
}

double load(const unsigned char* p, DType t) {
  switch (t) {
    case DType::f16: return f16_to_double(get<uint16_t>(p));
    case DType::bf16: return bf16_to_double(get<uint16_t>(p));
    case DType::f32: return get<float>(p);
    default: return get<double>(p);
  }
}

void store(unsigned char* p, DType t, double x) {
  switch (t) {
    case DType::f16: put(p, f16_from_double(x)); break;
    case DType::bf16: put(p, bf16_from_double(x)); break;
    case DType::f32: put(p, static_cast<float>(x)); break;
    default: put(p, x);
  }
}

}  // namespace

Values draw_values(const Case& c, DType dtype, uint64_t seed) {
  const Shapes s = shapes_of(c);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  Values values;
  const auto draw = [&](const char* name, const Shape& shape, DType t) {
    auto& x = values[name];
    x.resize(static_cast<std::size_t>(count(shape)));
    for (double& v : x) v = rounded(static_cast<float>(normal(generator)), t);
  };
  draw("q", s.q, dtype);
  draw("k", s.k, dtype);
  draw("v", s.v, dtype);
  draw("dout", s.out, dtype);
  if (c.dlse) draw("dlse", s.lse, DType::f32);
  if (!s.bias.empty()) draw("bias", s.bias, dtype);
  if (!s.sink.empty()) draw("sink", s.sink, dtype);
  if (!s.alibi.empty()) {
    auto& slopes = values["alibi"];
    for (int64_t i = 0; i < count(s.alibi); ++i) slopes.push_back(std::ldexp(1.0, -static_cast<int>(1 + i)));
  }
  return values;
}

Instance::Instance(const Case& c, DType dtype, const Values& values) : case_(c) {
  const Shapes s = shapes_of(c);
  for (const char* name : {"q", "dq"}) add(name, dtype, s.q, c.heads_first);
  for (const char* name : {"k", "dk"}) add(name, dtype, s.k, c.heads_first);
  for (const char* name : {"v", "dv"}) add(name, dtype, s.v, c.heads_first);
  for (const char* name : {"out", "dout"}) add(name, dtype, s.out, c.heads_first);
  add("lse", DType::f32, s.lse);
  if (c.dlse) add("dlse", DType::f32, s.lse);
  if (!s.bias.empty()) scores_.bias = add("bias", dtype, s.bias), add("dbias", DType::f32, s.bias);
  if (!s.sink.empty()) scores_.sink = add("sink", dtype, s.sink), add("dsink", DType::f32, s.sink);
  if (!s.alibi.empty()) scores_.alibi_slopes = add("alibi", DType::f32, s.alibi);
  for (const auto& [name, x] : values) {
    const Tensor& t = tensors_.at(name);
    auto* data = static_cast<unsigned char*>(t.data);
    auto value = x.begin();
    for_each_element(t, [&t, data, &value](int64_t offset) { store(data + offset, t.dtype, *value++); });
  }

  scores_.causal = c.causal;
  scores_.window_left = c.window_left;
  scores_.window_right = c.window_right;
  scores_.attention_chunk = c.chunk;
  scores_.softcap = c.softcap;
  if (c.softmax_scale > 0) scores_.softmax_scale = c.softmax_scale;

  const auto running_sum = [](const std::vector<int32_t>& lengths) {
    std::vector<int32_t> sum{0};
    for (const int32_t n : lengths) sum.push_back(sum.back() + n);
    return sum;
  };
  if (c.packed()) add_numbers(sequences_.cu_seqlens_q, running_sum(c.lengths_q));
  if (!c.lengths_k.empty()) add_numbers(sequences_.cu_seqlens_k, running_sum(c.lengths_k));
  add_numbers(sequences_.seqused_q, c.seqused_q);
  add_numbers(sequences_.seqused_k, c.seqused_k);
  add_numbers(sequences_.leftpad_k, c.leftpad_k);
  add_numbers(sequences_.cache_batch_idx, c.cache_batch_idx);
  if (c.page_size > 0) {
    // Pages in falling order, with one left over: nobody may rely on neighbours.
    const int64_t batch = c.packed() ? static_cast<int64_t>(c.lengths_q.size()) : c.batch;
    std::vector<int32_t> table(static_cast<std::size_t>(s.k[0] - 1));
    std::iota(table.rbegin(), table.rend(), 1);
    add_numbers(sequences_.block_table, table, static_cast<int64_t>(table.size()) / batch);
  }
}

Tensor Instance::add(const std::string& name, DType dtype, Shape shape, bool heads_first) {
  auto& bytes = memory_[name];
  bytes.resize(static_cast<std::size_t>(count(shape)) * size_of(dtype) +
               16);  // never empty: an address even for nothing
  Tensor t;
  t.data = bytes.data();
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  std::vector<int> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  if (heads_first && shape.size() == 4) std::swap(order[1], order[2]);
  int64_t stride = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d)
    t.stride[*d] = stride, stride *= shape[static_cast<std::size_t>(*d)];
  return tensors_[name] = t;
}

void Instance::add_numbers(Tensor& t, const std::vector<int32_t>& values, int64_t cols) {
  if (values.empty()) return;
  const auto& kept = numbers_.emplace_back(values);
  const int64_t n = static_cast<int64_t>(kept.size());
  t = cols > 0 ? view(kept.data(), {n / cols, cols}) : view(kept.data(), {n});
}

Forward Instance::forward(const std::string& backend) const {
  const auto t = [&](const char* name) { return tensors_.at(name); };
  return {.q = t("q"),
          .k = t("k"),
          .v = t("v"),
          .out = t("out"),
          .lse = t("lse"),
          .sequences = sequences_,
          .scores = scores_,
          .dropout = {.p = case_.dropout, .seed = 1234, .offset = 56},
          .run = {.backend = backend, .positive_empty_lse = case_.positive_empty_lse}};
}

Backward Instance::backward(const std::string& backend) const {
  const auto t = [&](const char* name) { return tensors_.contains(name) ? tensors_.at(name) : Tensor{}; };
  return {.dout = t("dout"),
          .q = t("q"),
          .k = t("k"),
          .v = t("v"),
          .out = t("out"),
          .lse = t("lse"),
          .dq = t("dq"),
          .dk = t("dk"),
          .dv = t("dv"),
          .dlse = t("dlse"),
          .dbias = t("dbias"),
          .dsink = t("dsink"),
          .sequences = sequences_,
          .scores = scores_,
          .dropout = {.p = case_.dropout, .seed = 1234, .offset = 56},
          .run = {.backend = backend, .positive_empty_lse = case_.positive_empty_lse}};
}

void Instance::spoil(Pass pass) {
  for (const auto& name : results(pass)) std::fill(memory_.at(name).begin(), memory_.at(name).end(), 0xFF);
}

std::vector<std::string> Instance::results(Pass pass) const {
  if (pass == Pass::forward) return {"out", "lse"};
  std::vector<std::string> names{"dq", "dk", "dv"};
  for (const char* name : {"dbias", "dsink"}) {
    if (tensors_.contains(name)) names.emplace_back(name);
  }
  return names;
}

std::vector<double> Instance::read(const std::string& name) const {
  const Tensor& t = tensors_.at(name);
  const auto* data = static_cast<const unsigned char*>(t.data);
  std::vector<double> x;
  x.reserve(static_cast<std::size_t>(t.numel()));
  for_each_element(t, [&](int64_t offset) { x.push_back(load(data + offset, t.dtype)); });
  return x;
}

}  // namespace flash_attn::cli
