// The C ABI: the same results as the C++ API, codes and words for every malformed call, structs of other ages.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <ostream>
#include <thread>
#include <vector>

#include "flash_attn/flash_attn.h"
#include "flash_attn/flash_attn.hpp"

namespace {

/// batch 2, 5 queries, 7 keys, 4 heads over 2, headdim 8.
struct Call {
  std::vector<float> q_data = filled(320), k_data = filled(224), v_data = filled(224);
  std::vector<float> out_data = std::vector<float>(320, -7.0f), lse_data = std::vector<float>(40, -7.0f);
  flash_attn_tensor q = tensor(q_data, {2, 5, 4, 8}), k = tensor(k_data, {2, 7, 2, 8}),
                    v = tensor(v_data, {2, 7, 2, 8});
  flash_attn_tensor out = tensor(out_data, {2, 5, 4, 8}), lse = tensor(lse_data, {2, 4, 5});
  int32_t cu_data[3] = {0, 5, 10};
  flash_attn_tensor cu{};
  flash_attn_options options{};
  flash_attn_forward_args args{};

  Call() {
    const int64_t three = 3;
    cu = flash_attn_view(cu_data, FLASH_ATTN_I32, 1, &three);
    EXPECT_EQ(flash_attn_options_init(&options, sizeof options), FLASH_ATTN_OK);
    EXPECT_EQ(flash_attn_forward_args_init(&args, sizeof args), FLASH_ATTN_OK);
    args.q = &q, args.k = &k, args.v = &v, args.out = &out, args.lse = &lse, args.options = &options;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  static std::vector<float> filled(int n) {
    std::vector<float> x(n);
    for (int i = 0; i < n; ++i) x[i] = std::sin(0.7f * static_cast<float>(i));
    return x;
  }
  static flash_attn_tensor tensor(std::vector<float>& data, std::vector<int64_t> shape) {
    return flash_attn_view(data.data(), FLASH_ATTN_F32, static_cast<int32_t>(shape.size()), shape.data());
  }
  bool untouched() const {
    return out_data == std::vector<float>(320, -7.0f) && lse_data == std::vector<float>(40, -7.0f);
  }
};

bool contains(const char* text, const char* part) { return std::strstr(text, part) != nullptr; }

TEST(CApi, ForwardIsTheCppForward) {
  Call c;
  c.options.causal = 1;
  c.options.has_softmax_scale = 1;
  c.options.softmax_scale = 0.3;
  ASSERT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_STREQ(flash_attn_last_error(), "");
  std::vector<float> out(320), lse(40);
  using flash_attn::view;
  flash_attn::forward({.q = view(c.q_data.data(), {2, 5, 4, 8}),
                       .k = view(c.k_data.data(), {2, 7, 2, 8}),
                       .v = view(c.v_data.data(), {2, 7, 2, 8}),
                       .out = view(out.data(), {2, 5, 4, 8}),
                       .lse = view(lse.data(), {2, 4, 5}),
                       .scores = {.softmax_scale = 0.3, .causal = true}});
  EXPECT_EQ(c.out_data, out);
  EXPECT_EQ(c.lse_data, lse);
}

TEST(CApi, NewKeysJoinTheCache) {
  Call c;
  int32_t used_data[2] = {3, 5}, positions_data[2] = {0, 9};
  const int64_t two = 2;
  std::vector<float> new_k = Call::filled(64), new_v = Call::filled(64), cos = Call::filled(30), sin = Call::filled(30);
  flash_attn_tensor used = flash_attn_view(used_data, FLASH_ATTN_I32, 1, &two),
                    positions = flash_attn_view(positions_data, FLASH_ATTN_I32, 1, &two);
  flash_attn_tensor tk = Call::tensor(new_k, {2, 2, 2, 8}), tv = Call::tensor(new_v, {2, 2, 2, 8}),
                    tcos = Call::tensor(cos, {15, 2}), tsin = Call::tensor(sin, {15, 2});
  c.options.seqused_k = &used;
  c.args.new_k = &tk, c.args.new_v = &tv, c.args.rotary_cos = &tcos, c.args.rotary_sin = &tsin;
  c.args.rotary_positions = &positions, c.args.rotary_interleaved = 1;
  std::vector<float> k = c.k_data, v = c.v_data, out(320);
  ASSERT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
  using flash_attn::view;
  flash_attn::forward({.q = view(c.q_data.data(), {2, 5, 4, 8}),
                       .k = view(k.data(), {2, 7, 2, 8}),
                       .v = view(v.data(), {2, 7, 2, 8}),
                       .out = view(out.data(), {2, 5, 4, 8}),
                       .sequences = {.seqused_k = view(used_data, {2})},
                       .new_keys = {.k = view(new_k.data(), {2, 2, 2, 8}), .v = view(new_v.data(), {2, 2, 2, 8})},
                       .rotary = {.cos = view(cos.data(), {15, 2}),
                                  .sin = view(sin.data(), {15, 2}),
                                  .interleaved = true,
                                  .positions = view(positions_data, {2})}});
  EXPECT_EQ(c.out_data, out);
  EXPECT_EQ(c.k_data, k);
  EXPECT_NE(c.k_data, Call::filled(224));
  EXPECT_EQ(c.v_data, v);

  c.args.new_v = nullptr;
  EXPECT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flash_attn_last_error(), "new_keys.v: required")) << flash_attn_last_error();
  EXPECT_EQ(c.k_data, k);
}

/// A program that was built against the first header knows nothing of new keys.
TEST(CApi, ForwardArgsOfTheFirstRelease) {
  Call c;
  c.args.new_k = &c.q;  // behind what it says it has
  c.args.struct_size = offsetof(flash_attn_forward_args, new_k);
  EXPECT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
}

TEST(CApi, OptionsMayBeAbsent) {
  Call c;
  c.args.options = nullptr;
  c.args.lse = nullptr;
  EXPECT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_NE(c.out_data[0], -7.0f);
}

TEST(CApi, BackwardIsTheCppBackward) {
  Call c;
  ASSERT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
  std::vector<float> dout = Call::filled(320), dq(320), dk(224), dv(224), dq2(320), dk2(224), dv2(224);
  flash_attn_tensor tdout = Call::tensor(dout, {2, 5, 4, 8}), tdq = Call::tensor(dq, {2, 5, 4, 8}),
                    tdk = Call::tensor(dk, {2, 7, 2, 8}), tdv = Call::tensor(dv, {2, 7, 2, 8});
  flash_attn_backward_args args;
  ASSERT_EQ(flash_attn_backward_args_init(&args, sizeof args), FLASH_ATTN_OK);
  args.dout = &tdout, args.q = &c.q, args.k = &c.k, args.v = &c.v, args.out = &c.out, args.lse = &c.lse;
  args.dq = &tdq, args.dk = &tdk, args.dv = &tdv;
  ASSERT_EQ(flash_attn_backward(&args), FLASH_ATTN_OK) << flash_attn_last_error();
  using flash_attn::view;
  flash_attn::backward({.dout = view(dout.data(), {2, 5, 4, 8}),
                        .q = view(c.q_data.data(), {2, 5, 4, 8}),
                        .k = view(c.k_data.data(), {2, 7, 2, 8}),
                        .v = view(c.v_data.data(), {2, 7, 2, 8}),
                        .out = view(c.out_data.data(), {2, 5, 4, 8}),
                        .lse = view(c.lse_data.data(), {2, 4, 5}),
                        .dq = view(dq2.data(), {2, 5, 4, 8}),
                        .dk = view(dk2.data(), {2, 7, 2, 8}),
                        .dv = view(dv2.data(), {2, 7, 2, 8})});
  EXPECT_EQ(dq, dq2);
  EXPECT_EQ(dk, dk2);
  EXPECT_EQ(dv, dv2);
  EXPECT_NE(dq, std::vector<float>(320));

  args.dk = &tdq;
  EXPECT_EQ(flash_attn_backward(&args), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flash_attn_last_error(), "dk: expected the shape of k")) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_backward(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
}

// ---- Malformed calls
// --------------------------------------------------------------------------------------------------

struct Row {
  const char* name;
  std::function<void(Call&)> spoil;
  int code;
  const char* words;
};
std::ostream& operator<<(std::ostream& out, const Row& row) { return out << row.name; }

// clang-format off
const Row kRows[] = {
  {"q_null", [](Call& c) { c.args.q = nullptr; }, FLASH_ATTN_INVALID_ARGUMENT, "q: required"},
  {"k_null", [](Call& c) { c.args.k = nullptr; }, FLASH_ATTN_INVALID_ARGUMENT, "k: required"},
  {"v_null", [](Call& c) { c.args.v = nullptr; }, FLASH_ATTN_INVALID_ARGUMENT, "v: required"},
  {"out_null", [](Call& c) { c.args.out = nullptr; }, FLASH_ATTN_INVALID_ARGUMENT, "out: required"},
  {"data_null", [](Call& c) { c.q.data = nullptr; }, FLASH_ATTN_INVALID_ARGUMENT, "q: no data"},
  {"args_size_0", [](Call& c) { c.args.struct_size = 0; }, FLASH_ATTN_INVALID_ARGUMENT, "flash_attn_forward_args.struct_size: expected at least"},
  {"options_size_0", [](Call& c) { c.options.struct_size = 0; }, FLASH_ATTN_INVALID_ARGUMENT, "flash_attn_options.struct_size: expected at least"},
  {"ndim_negative", [](Call& c) { c.lse.ndim = -4; }, FLASH_ATTN_INVALID_ARGUMENT, "lse: expected 0 to 5 dimensions, got -4"},
  {"ndim_6", [](Call& c) { c.q.ndim = 6; }, FLASH_ATTN_INVALID_ARGUMENT, "q: expected 0 to 5 dimensions, got 6"},
  {"ndim_0", [](Call& c) { c.q.ndim = 0; }, FLASH_ATTN_INVALID_ARGUMENT, "q: expected 4 dimensions"},
  {"view_of_null_shape", [](Call& c) { c.q = flash_attn_view(c.q.data, FLASH_ATTN_F32, 4, nullptr); }, FLASH_ATTN_INVALID_ARGUMENT, "q: expected 0 to 5 dimensions"},
  {"view_too_large", [](Call& c) { const int64_t s[4] = {int64_t{1} << 40, int64_t{1} << 40, 4, 8}; c.q = flash_attn_view(c.q.data, FLASH_ATTN_F32, 4, s); }, FLASH_ATTN_INVALID_ARGUMENT, "q: shape"},
  {"dtype_unknown", [](Call& c) { c.k.dtype = 99; }, FLASH_ATTN_TYPE_MISMATCH, "k: unknown dtype"},
  {"dtype_mixed", [](Call& c) { c.k.dtype = FLASH_ATTN_BF16; }, FLASH_ATTN_TYPE_MISMATCH, "k: expected float32, got bfloat16"},
  {"device", [](Call& c) { c.v.device_type = 2; }, FLASH_ATTN_INVALID_ARGUMENT, "v: expected a tensor on the CPU"},
  {"zero_headdim", [](Call& c) { c.q.shape[3] = c.k.shape[3] = 0; }, FLASH_ATTN_INVALID_ARGUMENT, "q: expected headdim >= 1"},
  {"zero_heads", [](Call& c) { c.k.shape[2] = c.v.shape[2] = 0; }, FLASH_ATTN_INVALID_ARGUMENT, "k: expected nheads_k >= 1"},
  {"heads", [](Call& c) { c.q.shape[2] = c.out.shape[2] = 3; }, FLASH_ATTN_INVALID_ARGUMENT, "k: expected nheads_k to divide nheads = 3"},
  {"window", [](Call& c) { c.options.window_left = -2; }, FLASH_ATTN_INVALID_ARGUMENT, "window_left: expected"},
  {"window_zeroed", [](Call& c) { c.options.window_right = INT64_MIN; }, FLASH_ATTN_INVALID_ARGUMENT, "window_right: expected"},
  {"softcap_nan", [](Call& c) { c.options.softcap = NAN; }, FLASH_ATTN_INVALID_ARGUMENT, "softcap: expected"},
  {"scale_inf", [](Call& c) { c.options.has_softmax_scale = 1; c.options.softmax_scale = INFINITY; }, FLASH_ATTN_INVALID_ARGUMENT, "softmax_scale: expected"},
  {"dropout", [](Call& c) { c.options.dropout_p = 1.5; }, FLASH_ATTN_INVALID_ARGUMENT, "dropout_p: expected"},
  {"backend", [](Call& c) { c.options.backend = "nope"; }, FLASH_ATTN_INVALID_ARGUMENT, "backend: expected one of cpu, reference"},
  {"cu_without_packing", [](Call& c) { c.options.cu_seqlens_q = &c.cu; }, FLASH_ATTN_INVALID_ARGUMENT, "q: expected 3 dimensions (total_q, nheads, headdim)"},
  {"cu_null_data", [](Call& c) { c.cu.data = nullptr; c.options.seqused_k = &c.cu; }, FLASH_ATTN_INVALID_ARGUMENT, "seqused_k: no data"},
  {"out_is_q", [](Call& c) { c.args.out = &c.q; }, FLASH_ATTN_INVALID_ARGUMENT, "out: an output must not overlap"},
};
// clang-format on

class CApiMalformed : public testing::TestWithParam<Row> {};
TEST_P(CApiMalformed, IsRefused) {
  Call c;
  GetParam().spoil(c);
  const std::vector<float> q = c.q_data;
  EXPECT_EQ(flash_attn_forward(&c.args), GetParam().code) << flash_attn_last_error();
  EXPECT_TRUE(contains(flash_attn_last_error(), GetParam().words)) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_explain_forward(&c.args, nullptr, 0, nullptr), GetParam().code) << "explain";
  EXPECT_TRUE(c.untouched());
  EXPECT_EQ(c.q_data, q);
}
INSTANTIATE_TEST_SUITE_P(Table, CApiMalformed, testing::ValuesIn(kRows),
                         [](const auto& info) { return info.param.name; });

TEST(CApi, NullStructs) {
  EXPECT_EQ(flash_attn_forward(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flash_attn_last_error(), "null pointer")) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_options_init(nullptr, sizeof(flash_attn_options)), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_EQ(flash_attn_forward_args_init(nullptr, 0), FLASH_ATTN_INVALID_ARGUMENT);
  flash_attn_backward_args small;
  std::memset(&small, 0x5A, sizeof small);
  EXPECT_EQ(flash_attn_backward_args_init(&small, 8), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_EQ(reinterpret_cast<const unsigned char*>(&small)[0], 0x5A) << "written";
}

TEST(CApi, StructsOfANewerProgram) {
  Call c;
  struct Newer {
    flash_attn_options options;
    int64_t unheard_of;
  } newer;
  ASSERT_EQ(flash_attn_options_init(&newer.options, sizeof newer), FLASH_ATTN_OK);
  EXPECT_EQ(newer.options.struct_size, sizeof newer);
  EXPECT_EQ(newer.options.window_left, -1);
  EXPECT_EQ(newer.unheard_of, 0);
  c.args.options = &newer.options;
  EXPECT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
  newer.unheard_of = 1;
  EXPECT_EQ(flash_attn_forward(&c.args), FLASH_ATTN_NOT_SUPPORTED);
  EXPECT_TRUE(contains(flash_attn_last_error(), "flash_attn_options")) << flash_attn_last_error();
}

TEST(CApi, ExplainFitsItsBuffer) {
  Call c;
  std::size_t needed = 0;
  ASSERT_EQ(flash_attn_explain_forward(&c.args, nullptr, 0, &needed), FLASH_ATTN_OK) << flash_attn_last_error();
  std::vector<char> text(needed, 'x'), part(11, 'x');
  ASSERT_EQ(flash_attn_explain_forward(&c.args, text.data(), text.size(), nullptr), FLASH_ATTN_OK);
  EXPECT_EQ(std::strlen(text.data()) + 1, needed);
  EXPECT_TRUE(contains(text.data(), "forward float32 batch 2")) << text.data();
  EXPECT_TRUE(contains(text.data(), "* cpu")) << text.data();
  ASSERT_EQ(flash_attn_explain_forward(&c.args, part.data(), 8, nullptr), FLASH_ATTN_OK);
  EXPECT_STREQ(part.data(), "forward");
  EXPECT_EQ(part[8], 'x') << "beyond the capacity";
  EXPECT_EQ(flash_attn_explain_forward(&c.args, nullptr, 8, nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(c.untouched());
}

TEST(CApi, ErrorsAreKeptPerThread) {
  EXPECT_EQ(flash_attn_forward(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  std::string other = "?";
  std::thread([&] { other = flash_attn_last_error(); }).join();
  EXPECT_EQ(other, "");
  EXPECT_STRNE(flash_attn_last_error(), "");
}

TEST(CApi, ThreadsOfTheHost) {
  std::atomic<int64_t> ran{0};
  const auto serial = [](void* host, int64_t n, flash_attn_task task, void* context) {
    for (int64_t i = 0; i < n; ++i) task(context, i);
    *static_cast<std::atomic<int64_t>*>(host) += n;
  };
  Call own, hosted;
  std::vector<float> data = Call::filled(4096), own_out(4096), hosted_out(4096);  // large enough for several threads
  for (Call* c : {&own, &hosted}) {
    c->q = c->k = c->v = Call::tensor(data, {2, 64, 4, 8});
    c->out = Call::tensor(c == &own ? own_out : hosted_out, {2, 64, 4, 8});
    c->args.lse = nullptr;
  }
  ASSERT_EQ(flash_attn_forward(&own.args), FLASH_ATTN_OK) << flash_attn_last_error();
  const int before = flash_attn_num_threads();
  EXPECT_EQ(flash_attn_set_num_threads(2), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_num_threads(), 2);
  ASSERT_EQ(flash_attn_set_parallel_for(serial, &ran), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_forward(&hosted.args), FLASH_ATTN_OK) << flash_attn_last_error();
  ASSERT_EQ(flash_attn_set_parallel_for(nullptr, nullptr), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_set_num_threads(0), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_num_threads(), before);
  EXPECT_GT(ran.load(), 0);
  EXPECT_EQ(own_out, hosted_out);
}

TEST(CApi, Version) { EXPECT_STREQ(flash_attn_version(), flash_attn::version()); }

}  // namespace
