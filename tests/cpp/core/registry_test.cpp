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
  std::span<const int32_t> devices() const override { return kHostMemory; }
  const Serves* serves(Pass pass) const override {
    static const Serves forward = {.dtypes = bit(DType::f32),
                                   .features = kAllFeatures & ~features({Feature::lse, Feature::softcap}),
                                   .words = {{Feature::softcap, "softcap: has no score to cap"}}};
    return pass == Pass::forward ? &forward : nullptr;
  }
  std::string refuses(const Problem& p) const override {
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

/// What `explain` says of one backend.
Candidate candidate(const Forward& call, const std::string& name) {
  for (const Candidate& c : explain(call).candidates)
    if (c.backend == name) return c;
  ADD_FAILURE() << "nobody is called " << name;
  return {};
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
  EXPECT_TRUE(candidate(call, "one-key").chosen);
  EXPECT_FALSE(candidate(call, "cpu").chosen);
  EXPECT_EQ(explain(call).plan, "one copy per row");

  call.run.backend.clear();  // not automatic: never chosen unasked
  EXPECT_FALSE(candidate(call, "one-key").chosen);
}

TEST_F(Registry, RefusalSaysWhyAndWhoWouldServe) {
  Forward call = fixed_call(store);
  call.lse = {};
  call.run.backend = "one-key";
  store.remember();
  const std::string words = error_of([&] { forward(call); }, ErrorCode::not_supported);
  EXPECT_TRUE(contains(words, "one-key serves sequences of one key only")) << words;
  EXPECT_TRUE(contains(words, "reference")) << words;
  EXPECT_TRUE(store.untouched());
  EXPECT_EQ(explain(call).plan, "");
  EXPECT_EQ(candidate(call, "one-key").why_not, "k: one-key serves sequences of one key only");
}

TEST_F(Registry, UnknownNamesListTheKnown) {
  Forward call = one_key_call(store);
  call.run.backend = "warp";
  const std::string words = error_of([&] { forward(call); }, ErrorCode::invalid_argument);
  for (const char* name : {"cpu", "reference", "one-key", "\"warp\""}) EXPECT_TRUE(contains(words, name)) << words;
  error_of([] { unregister_backend("warp"); }, ErrorCode::invalid_argument);
}

TEST_F(Registry, EnvironmentDecidesWhereTheCallDoesNot) {
  Forward call = one_key_call(store);
  setenv("FLASH_ATTENTION_BACKEND", "one-key", 1);
  EXPECT_TRUE(candidate(call, "one-key").chosen);
  call.run.backend = "reference";
  EXPECT_TRUE(candidate(call, "reference").chosen);
  call.run.backend.clear();
  setenv("FLASH_ATTENTION_BACKEND", "warp", 1);
  const std::string words = error_of([&] { forward(call); }, ErrorCode::invalid_argument);
  EXPECT_TRUE(contains(words, "FLASH_ATTENTION_BACKEND")) << words;
  unsetenv("FLASH_ATTENTION_BACKEND");
  EXPECT_FALSE(candidate(call, "one-key").chosen);
}

TEST_F(Registry, NamesAreUniqueAndUnregisteringTakesOut) {
  error_of([] { register_backend(std::make_unique<OneKeyBackend>()); }, ErrorCode::invalid_argument);
  error_of([] { register_backend(nullptr); }, ErrorCode::invalid_argument);
  unregister_backend("one-key");
  for (const Backend* backend : registered_backends()) EXPECT_NE(backend->name(), "one-key");
}

TEST_F(Registry, CapabilityDataRefuse) {
  struct Row {
    const char* words;
    std::function<void(Forward&)> spoil;
  };
  const Row rows[] = {
      {"lse: not served",
       [&](Forward& c) {
         c.lse = store.floats({1, 2, 3});
       }},
      {"softcap: has no score to cap", [](Forward& c) { c.scores.softcap = 3; }},
      {"dtype: float64 is not served (float32 is)",
       [&](Forward& c) {
         for (Tensor* t : {&c.q, &c.k, &c.v, &c.out}) t->dtype = DType::f64, t->shape[3] = 2;
       }},
      {"its backward is not served, and gradients will be asked for", [](Forward& c) { c.run.differentiable = true; }},
  };
  for (const Row& row : rows) {
    Forward call = one_key_call(store);
    call.run.backend = "one-key";
    row.spoil(call);
    EXPECT_EQ(candidate(call, "one-key").why_not, row.words);
    error_of([&] { forward(call); }, ErrorCode::not_supported);
  }
}

TEST_F(Registry, ABackwardPrefersWhoRanTheForwardAndHoldsToWhoIsNamed) {
  Forward call = one_key_call(store);
  call.run.prefer = "one-key";
  EXPECT_TRUE(candidate(call, "one-key").chosen);
  call.scores.softcap = 3;  // not served: the others are asked
  EXPECT_TRUE(candidate(call, "cpu").chosen);
  call.run.prefer = "gone";
  EXPECT_TRUE(candidate(call, "cpu").chosen);
}

TEST_F(Registry, PlacesAreChosen) {
  unregister_backend("one-key");
  error_of([] { register_backend(std::make_unique<OneKeyBackend>(), "warp"); }, ErrorCode::invalid_argument);
  register_backend(std::make_unique<OneKeyBackend>(), "cpu");
  EXPECT_EQ(registered_backends().front()->name(), "one-key");
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
  EXPECT_TRUE(contains(words, "cpu:") && contains(words, "reference:") && contains(words, "cuda:0")) << words;
  EXPECT_TRUE(contains(words, "register")) << words;
}

/// One that asks the Problem for its contents, which on a device would read foreign memory.
class NosyBackend final : public Backend {
 public:
  std::string_view name() const override { return "nosy"; }
  std::string_view description() const override { return "reads lengths"; }
  std::span<const int32_t> devices() const override { return kHostMemory; }
  const Serves* serves(Pass) const override {
    static const Serves all = {.dtypes = bit(DType::f32), .features = kAllFeatures};
    return &all;
  }
  std::string refuses(const Problem&) const override {
    ++asked;
    return {};
  }
  std::string unavailable() const override {
    ++asked;
    return {};
  }
  void forward(const Problem&) const override {}
  void backward(const Problem&) const override {}
  static inline int asked = 0;
};

TEST(Choice, NobodyIsAskedAboutADeviceItDoesNotName) {
  register_backend(std::make_unique<NosyBackend>(), "cpu");
  Store store;
  Forward call = fixed_call(store);
  for (Tensor* t : {&call.q, &call.k, &call.v, &call.out, &call.lse}) t->device = {2, 0};
  NosyBackend::asked = 0;
  explain(call);
  error_of([&] { forward(call); }, ErrorCode::not_supported);
  EXPECT_EQ(NosyBackend::asked, 0);
  explain(fixed_call(store));
  EXPECT_GT(NosyBackend::asked, 0);
  unregister_backend("nosy");
}

}  // namespace
}  // namespace flash_attn::test
