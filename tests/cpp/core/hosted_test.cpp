// Hosted backends: chosen by their data, for any device, and never run by the core.
#include "core/hosted.hpp"

#include <gtest/gtest.h>

#include <functional>

#include "core/backend.hpp"
#include "core/calls.hpp"
#include "core/problem.hpp"

namespace flash_attn::test {
namespace {

constexpr Device kGpu{2, 0};

Forward on_gpu(Forward call) {
  for (Tensor* t : {&call.q, &call.k, &call.v, &call.out, &call.lse, &call.sequences.cu_seqlens_q,
                    &call.sequences.cu_seqlens_k, &call.dropout.state})
    t->device = kGpu;
  return call;
}

Hosted gpu_backend(std::string name) {
  const Serves all = {.dtypes = bit(DType::f32), .features = kAllFeatures, .max_headdim = 256, .headdim_multiple = 2};
  return {.name = std::move(name), .description = "a toy", .devices = {2}, .forward = all, .backward = all};
}

std::string chosen(const Forward& call) {
  const Choice choice = choose(make_problem(call));
  return choice.backend ? std::string(choice.backend->name()) : "nobody";
}

class HostedTest : public testing::Test {
 protected:
  void SetUp() override { register_hosted(gpu_backend("toy")); }
  void TearDown() override {
    for (const char* name : {"toy", "toy2"})
      for (const Backend* backend : registered_backends())
        if (backend->name() == name) {
          unregister_backend(name);
          break;
        }
  }
  Store store;
};

TEST_F(HostedTest, ServesItsDeviceOnly) {
  EXPECT_EQ(chosen(on_gpu(fixed_call(store))), "toy");
  EXPECT_EQ(chosen(fixed_call(store)), "cpu");
}

TEST_F(HostedTest, IsNotRunByTheCore) {
  try {
    forward(on_gpu(fixed_call(store)));
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::internal) << e.what();
  }
}

TEST_F(HostedTest, RefusesByDataAvailabilityAndVeto) {
  const Forward call = on_gpu(fixed_call(store));
  Hosted toy = gpu_backend("toy");
  toy.forward->features &= ~bit(Feature::grouped);
  register_hosted(toy);
  EXPECT_EQ(answer(*choose(make_problem(fixed_call(store))).backend, make_problem(fixed_call(store)), false), "");
  EXPECT_EQ(chosen(call), "nobody");

  toy = gpu_backend("toy");
  toy.unavailable = "toys are not installed";
  register_hosted(toy);
  EXPECT_EQ(explain(call).candidates.back().why_not, "toys are not installed");

  register_hosted(gpu_backend("toy"));
  EXPECT_EQ(chosen(call), "toy");
  const Choice vetoed = choose(make_problem(call), {{"toy", "not today"}});
  EXPECT_EQ(vetoed.backend, nullptr);
  EXPECT_EQ(vetoed.candidates.back().why_not, "not today");
  EXPECT_THROW(choose_or_throw(make_problem(call), {{"toy", "not today"}}), Error);
}

TEST_F(HostedTest, HeaddimIsData) {
  Forward call = on_gpu(fixed_call(store));
  for (Tensor* t : {&call.q, &call.k}) t->shape[3] = 7;
  EXPECT_EQ(explain(call).candidates.back().why_not, "headdim: 7 is not served (multiples of 2 up to 256 are)");
}

TEST_F(HostedTest, LimitsThatAreNoneAreNotRegistered) {
  const std::function<void(Serves&)> spoilers[] = {
      [](Serves& s) { s.headdim_multiple = 0; },
      [](Serves& s) { s.headdim_multiple = -8; },
      [](Serves& s) { s.max_headdim = -1; },
  };
  for (const auto& spoil : spoilers)
    for (const auto pass : {&Hosted::forward, &Hosted::backward}) {
      Hosted toy = gpu_backend("toy2");
      spoil(*(toy.*pass));
      EXPECT_THROW(register_hosted(toy), Error);
    }
  EXPECT_EQ(registered_backends().back()->name(), "toy") << "none was added";
}

TEST_F(HostedTest, TakesAPlaceAndIsReplacedThere) {
  register_hosted(gpu_backend("toy2"), "toy");
  EXPECT_EQ(chosen(on_gpu(fixed_call(store))), "toy2");
  Hosted again = gpu_backend("toy2");
  again.description = "another toy";
  register_hosted(again);
  EXPECT_EQ(chosen(on_gpu(fixed_call(store))), "toy2");
  EXPECT_EQ(choose(make_problem(on_gpu(fixed_call(store)))).backend->description(), "another toy");
  EXPECT_THROW(register_hosted(gpu_backend("cpu")), Error);
}

TEST_F(HostedTest, NamedForBothPassesItMustServeBoth) {
  Hosted toy = gpu_backend("toy");
  toy.backward.reset();
  register_hosted(toy);
  Forward call = on_gpu(fixed_call(store));
  call.run.differentiable = true;
  EXPECT_EQ(chosen(call), "toy") << "unnamed: another backend may run the backward";
  call.run.backend = "toy";
  EXPECT_EQ(chosen(call), "nobody");
  toy = gpu_backend("toy");
  toy.backward->features &= ~features({Feature::lse, Feature::new_keys});  // of the forward only
  register_hosted(toy);
  EXPECT_EQ(chosen(call), "toy");
}

TEST_F(HostedTest, TheProblemCarriesStreamAllocatorAndState) {
  Forward call = on_gpu(fixed_call(store));
  int stream = 0;
  call.run.stream = &stream;
  call.run.allocator.context = &stream;
  int64_t state[2] = {7, 8};
  call.dropout = {.p = 0.5, .state = view(state, DType::i64, {2})};
  call.dropout.state.device = kGpu;
  const Problem p = make_problem(call);
  EXPECT_EQ(p.run.stream, &stream);
  EXPECT_EQ(p.run.allocator.context, &stream);
  EXPECT_TRUE(p.scores.dropout.state.present()) << "left to the kernels";

  Forward here = fixed_call(store);
  here.dropout = {.p = 0.5, .state = view(state, DType::i64, {2})};
  const Problem q = make_problem(here);
  EXPECT_FALSE(q.scores.dropout.state.present());
  EXPECT_EQ(q.scores.dropout.seed, 7u);
  EXPECT_EQ(q.scores.dropout.offset, 8u);
}

TEST_F(HostedTest, TablesOfADeviceAreNotRead) {
  Forward call = on_gpu(packed_call(store));
  call.sequences.max_seqlen_q = call.sequences.max_seqlen_k = int64_t{1} << 60;
  call.sequences.cu_seqlens_q.data = call.sequences.cu_seqlens_k.data = reinterpret_cast<void*>(uintptr_t{64});
  const Problem p = make_problem(call);
  EXPECT_EQ(p.max_seqlen_q, 6) << "no more than the rows there are";
  EXPECT_EQ(p.max_seqlen_k, 8);
  EXPECT_EQ(chosen(call), "toy");
}

}  // namespace
}  // namespace flash_attn::test
