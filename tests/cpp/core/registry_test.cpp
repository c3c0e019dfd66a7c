// A new backend needs nothing but its own class: it is registered, chosen, explained, run and taken out again.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "core/backend.hpp"
#include "core/calls.hpp"

namespace flash_attn::test {
namespace {

/// The toy: serves batches of one key per sequence, where attention is a copy of v.
class OneKeyBackend final : public Backend {
 public:
  std::string_view name() const override { return "one-key"; }
  std::string_view description() const override { return "copies v where there is one key"; }
  bool automatic() const override { return false; }
  std::string plan(const Problem&) const override { return "one copy per row"; }
  std::string refuses(const Problem& p) const override {
    if (p.pass == Pass::backward) return "one-key has no backward";
    if (p.dtype != DType::f32) return "q: one-key serves float32 only";
    for (int64_t b = 0; b < p.batch; ++b)
      if (p.sequences.at(b).seqlen_k != 1) return "k: one-key serves sequences of one key only";
    return {};
  }
  void forward(const Problem& p) const override {
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = p.sequences.at(b);
      for (int64_t i = 0; i < s.seqlen_q; ++i)
        for (int64_t h = 0; h < p.nheads; ++h) {
          const auto* v = reinterpret_cast<const float*>(p.v.at(s.k_batch, s.k_row, h / p.group()));
          auto* out = reinterpret_cast<float*>(p.out.at(s.q_batch, s.q_row + i, h));
          for (int64_t d = 0; d < p.headdim_v; ++d) out[d * p.out.stride_col] = v[d * p.v.stride_col];
        }
    }
  }
  void backward(const Problem&) const override {}
};

Forward one_key_call(Store& store) {
  return {.q = store.floats({1, 3, 2, 4}),
          .k = store.floats({1, 1, 1, 4}),
          .v = store.floats({1, 1, 1, 4}),
          .out = store.floats({1, 3, 2, 4})};
}

class Registry : public testing::Test {
 protected:
  void SetUp() override { register_backend(std::make_unique<OneKeyBackend>()); }
  void TearDown() override {
    for (const Backend* backend : registered_backends())
      if (backend->name() == "one-key") return unregister_backend("one-key");
  }
  Store store;
};

std::string error_of(const std::function<void()>& action, ErrorCode expected) {
  try {
    action();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), expected) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no error";
  return {};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_F(Registry, BuiltInsComeFirstAndTheToyIsListed) {
  std::vector<std::string> names;
  for (const BackendInfo& info : backends()) names.push_back(info.name);
  EXPECT_EQ(names, (std::vector<std::string>{"cpu", "reference", "one-key"}));
}

TEST_F(Registry, RunsByName) {
  Forward call = one_key_call(store);
  call.run.backend = "one-key";
  auto* v = static_cast<float*>(call.v.data);
  for (int d = 0; d < 4; ++d) v[d] = 10.0f + d;
  forward(call);
  for (int row = 0; row < 6; ++row)
    for (int d = 0; d < 4; ++d) EXPECT_EQ(static_cast<float*>(call.out.data)[row * 4 + d], 10.0f + d);
}

TEST_F(Registry, ExplainsTheChoiceAndThePlan) {
  Forward call = one_key_call(store);
  call.run.backend = "one-key";
  const Explanation e = explain(call);
  ASSERT_EQ(e.candidates.size(), 3u);
  EXPECT_TRUE(e.candidates[2].chosen);
  EXPECT_FALSE(e.candidates[0].chosen);
  EXPECT_EQ(e.plan, "one copy per row");

  call.run.backend.clear();  // not automatic: never chosen unasked
  EXPECT_FALSE(explain(call).candidates[2].chosen);
}

TEST_F(Registry, RefusalSaysWhyAndWhoWouldServe) {
  Forward call = fixed_call(store);
  call.run.backend = "one-key";
  store.remember();
  const std::string words = error_of([&] { forward(call); }, ErrorCode::not_supported);
  EXPECT_TRUE(contains(words, "one-key serves sequences of one key only")) << words;
  EXPECT_TRUE(contains(words, "reference")) << words;
  EXPECT_TRUE(store.untouched());
  const Explanation e = explain(call);
  EXPECT_EQ(e.plan, "");
  EXPECT_EQ(e.candidates[2].why_not, "k: one-key serves sequences of one key only");
}

TEST_F(Registry, UnknownNamesListTheKnown) {
  Forward call = one_key_call(store);
  call.run.backend = "warp";
  const std::string words = error_of([&] { forward(call); }, ErrorCode::invalid_argument);
  EXPECT_TRUE(contains(words, "cpu, reference, one-key") && contains(words, "\"warp\"")) << words;
  error_of([] { unregister_backend("warp"); }, ErrorCode::invalid_argument);
}

TEST_F(Registry, EnvironmentDecidesWhereTheCallDoesNot) {
  Forward call = one_key_call(store);
  setenv("FLASH_ATTENTION_BACKEND", "one-key", 1);
  EXPECT_TRUE(explain(call).candidates[2].chosen);
  call.run.backend = "reference";
  EXPECT_TRUE(explain(call).candidates[1].chosen);
  call.run.backend.clear();
  setenv("FLASH_ATTENTION_BACKEND", "warp", 1);
  const std::string words = error_of([&] { forward(call); }, ErrorCode::invalid_argument);
  EXPECT_TRUE(contains(words, "FLASH_ATTENTION_BACKEND")) << words;
  unsetenv("FLASH_ATTENTION_BACKEND");
  EXPECT_FALSE(explain(call).candidates[2].chosen);
}

TEST_F(Registry, NamesAreUniqueAndUnregisteringTakesOut) {
  error_of([] { register_backend(std::make_unique<OneKeyBackend>()); }, ErrorCode::invalid_argument);
  error_of([] { register_backend(nullptr); }, ErrorCode::invalid_argument);
  unregister_backend("one-key");
  EXPECT_EQ(registered_backends().size(), 2u);
}

TEST(Choice, GoesOnWhileBackendsComeAndGo) {
  std::vector<std::thread> readers;
  std::atomic<int> served{0};
  for (int t = 0; t < 3; ++t)
    readers.emplace_back([&served] {
      Store store;
      const Forward call = one_key_call(store);
      for (int i = 0; i < 50; ++i) served += explain(call).candidates.front().backend == "cpu";
    });
  for (int i = 0; i < 50; ++i) {
    register_backend(std::make_unique<OneKeyBackend>());
    unregister_backend("one-key");
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(served.load(), 150);
}

TEST(Choice, NobodyHereServesAnotherDevice) {
  Store store;
  Forward call = fixed_call(store);
  for (Tensor* t : {&call.q, &call.k, &call.v, &call.out, &call.lse}) t->device = {2, 0};
  const std::string words = error_of([&] { forward(call); }, ErrorCode::not_supported);
  EXPECT_TRUE(contains(words, "cpu:") && contains(words, "reference:") && contains(words, "device 2:0")) << words;
}

}  // namespace
}  // namespace flash_attn::test
