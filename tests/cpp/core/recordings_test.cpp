// The key of a call tells apart all that launches follow from; a recording is launched on the memory of its call.
#include "core/recordings.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <utility>
#include <vector>

#include "core/backend.hpp"
#include "core/calls.hpp"
#include "core/hosted.hpp"

namespace flash_attn::test {
namespace {

constexpr Device kGpu{2, 3};

/// A call that has every tensor (of no meaning together: keys are made of whatever there is).
Forward whole_forward(Store& store) {
  Forward call = joining_call(store);
  call.sequences.cu_seqlens_q = store.ints({0, 3, 5});
  call.sequences.cu_seqlens_k = store.ints({0, 3, 5});
  call.sequences.seqused_q = store.ints({3, 2});
  call.sequences.leftpad_k = store.ints({0, 1});
  call.sequences.cache_batch_idx = store.ints({1, 0});
  call.scores.alibi_slopes = store.floats({2, 4});
  call.scores.bias = store.floats({2, 4, 5, 7});
  call.scores.sink = store.floats({4});
  call.dropout.state = store.floats({2});
  call.new_keys.cu_seqlens = store.ints({0, 2, 4});
  call.rotary.positions = store.ints({1, 2});
  return call;
}

Backward whole_backward(Store& store) {
  const Forward f = whole_forward(store);
  Backward call = backward_call(store);
  call.sequences = f.sequences, call.scores = f.scores, call.dropout = f.dropout;
  call.dlse = store.floats({2, 4, 5});
  call.dbias = store.floats({2, 4, 5, 7});
  call.dsink = store.floats({4});
  return call;
}

std::vector<Tensor*> tensors(Sequences& s) {
  return {&s.cu_seqlens_q, &s.cu_seqlens_k,    &s.seqused_q,  &s.seqused_k,
          &s.leftpad_k,    &s.cache_batch_idx, &s.block_table};
}
std::vector<Tensor*> tensors(Scores& s, Dropout& d) { return {&s.alibi_slopes, &s.bias, &s.sink, &d.state}; }
std::vector<Tensor*> tensors(Forward& c) {
  std::vector<Tensor*> all = {&c.q,
                              &c.k,
                              &c.v,
                              &c.out,
                              &c.lse,
                              &c.new_keys.k,
                              &c.new_keys.v,
                              &c.new_keys.cu_seqlens,
                              &c.rotary.cos,
                              &c.rotary.sin,
                              &c.rotary.positions};
  for (Tensor* t : tensors(c.sequences)) all.push_back(t);
  for (Tensor* t : tensors(c.scores, c.dropout)) all.push_back(t);
  return all;
}
std::vector<Tensor*> tensors(Backward& c) {
  std::vector<Tensor*> all = {&c.dout, &c.q,  &c.k,  &c.v,    &c.out,   &c.lse,
                              &c.dq,   &c.dk, &c.dv, &c.dlse, &c.dbias, &c.dsink};
  for (Tensor* t : tensors(c.sequences)) all.push_back(t);
  for (Tensor* t : tensors(c.scores, c.dropout)) all.push_back(t);
  return all;
}

/// Every number of a call, spoiled one by one.
template <class Call>
std::vector<std::function<void(Call&)>> numbers() {
  std::vector<std::function<void(Call&)>> all = {
      [](Call& c) { c.q.device.index = 1; },
      [](Call& c) { c.q.device.type = 10; },
      [](Call& c) { c.sequences.max_seqlen_q = 5; },
      [](Call& c) { c.sequences.max_seqlen_k = 5; },
      [](Call& c) { c.sequences.used_k = 5; },
      [](Call& c) { c.scores.softmax_scale = 0.0; },
      [](Call& c) { c.scores.softmax_scale = 0.5; },
      [](Call& c) { c.scores.causal = true; },
      [](Call& c) { c.scores.window_left = 5; },
      [](Call& c) { c.scores.window_right = 5; },
      [](Call& c) { c.scores.attention_chunk = 5; },
      [](Call& c) { c.scores.softcap = 5; },
      [](Call& c) { c.dropout.p = 0.5; },
      [](Call& c) { c.dropout.seed = 5; },
      [](Call& c) { c.dropout.offset = 5; },
      [](Call& c) { c.run.backend = "toy"; },
      [](Call& c) { c.run.prefer = "toy"; },
      [](Call& c) { c.run.positive_empty_lse = true; },
      [](Call& c) { c.run.deterministic = true; },
      [](Call& c) { c.run.differentiable = true; },
  };
  if constexpr (std::is_same_v<Call, Forward>) all.push_back([](Call& c) { c.rotary.interleaved = true; });
  return all;
}

/// All keys that differ from that of `call` by one thing, which must all differ from one another.
template <class Call>
void expect_distinct(const Call& call) {
  std::multiset<std::string> keys = {key_of(call).bytes};
  for (const auto& change : numbers<Call>()) {
    Call other = call;
    change(other);
    keys.insert(key_of(other).bytes);
  }
  Call copy = call;
  const std::size_t n = tensors(copy).size();
  for (std::size_t i = 0; i < n; ++i) {
    const std::function<void(Tensor&)> changes[] = {
        [](Tensor& t) { t = {}; },
        [](Tensor& t) { t.dtype = DType::f16; },
        [](Tensor& t) { t.data = static_cast<char*>(t.data) + 4; },
        [](Tensor& t) { t.ndim -= 1; },
    };
    const auto add = [&](const std::function<void(Tensor&)>& change) {
      Call other = call;
      change(*tensors(other)[i]);
      keys.insert(key_of(other).bytes);
    };
    for (const auto& change : changes) add(change);
    for (int d = 0; d < tensors(copy)[i]->ndim; ++d) {
      add([d](Tensor& t) { t.shape[d] += 1; });
      add([d](Tensor& t) { t.stride[d] += 1; });
    }
  }
  EXPECT_GT(keys.size(), 200u);
  for (const std::string& key : keys) EXPECT_EQ(keys.count(key), 1u);
}

TEST(CallKeyTest, TellsApartAllThatLaunchesFollowFrom) {
  Store store;
  expect_distinct(whole_forward(store));
  expect_distinct(whole_backward(store));
}

TEST(CallKeyTest, IsTheSameOnOtherMemoryStreamsAndAllocators) {
  Store store;
  Forward call = whole_forward(store);
  for (Tensor* t : tensors(call)) t->data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t->data) & ~15ull);
  const std::string key = key_of(call).bytes;
  int there = 0;
  call.run.stream = &there;
  call.run.allocator.context = &there;
  for (Tensor* t : tensors(call)) t->data = static_cast<char*>(t->data) + 4096;
  const CallKey other = key_of(call);
  EXPECT_EQ(other.bytes, key);
  std::size_t present = 0;
  for (const void* address : other.addresses) present += address != nullptr;
  EXPECT_EQ(present, tensors(call).size()) << "each tensor has a place of its own";
  EXPECT_EQ(other.addresses[static_cast<std::size_t>(Role::sink)], call.scores.sink.data);
}

TEST(CallKeyTest, ChangesWithTheRegistryAndTheEnvironment) {
  Store store;
  const Forward call = fixed_call(store);
  std::set<std::string> keys = {key_of(call).bytes};
  const auto add_new = [&] { return keys.insert(key_of(call).bytes).second; };
  EXPECT_FALSE(add_new());
  register_hosted({.name = "toy", .description = "a toy", .devices = {2}});
  EXPECT_TRUE(add_new());
  register_hosted({.name = "toy", .description = "another toy", .devices = {2}});
  EXPECT_TRUE(add_new());
  unregister_backend("toy");
  EXPECT_TRUE(add_new());
  setenv("FLASH_ATTENTION_BACKEND", "toy", 1);
  EXPECT_TRUE(add_new());
  unsetenv("FLASH_ATTENTION_BACKEND");
  EXPECT_FALSE(add_new());
}

TEST(CallKeyTest, EveryRoleHasAName) {
  const std::set<std::string_view> names(kRoleNames.begin(), kRoleNames.end());
  EXPECT_EQ(names.size(), kRoles);
  EXPECT_FALSE(names.contains(""));
  EXPECT_EQ(kRoleNames[static_cast<std::size_t>(Role::out)], "out");
  EXPECT_EQ(kRoleNames[static_cast<std::size_t>(Role::block_table)], "block_table");
  EXPECT_EQ(kRoleNames[static_cast<std::size_t>(Role::dropout_state)], "dropout_state");
  EXPECT_EQ(kRoleNames[static_cast<std::size_t>(Role::rotary_positions)], "rotary_positions");
}

// ---- Replay
// ----------------------------------------------------------------------------------------------------------

struct Noting final : Launcher {
  struct Launched {
    uint64_t function;
    std::vector<uint64_t> values;
    void* stream;
  };
  const void* current = this;
  mutable std::vector<Launched> launched;

  const void* context() const override { return current; }
  void launch(const Launch& kernel, uint64_t* values, void* stream) const override {
    if (kernel.function == 666) throw Error(ErrorCode::device_failure, "CUDA: no");
    launched.push_back({kernel.function, {values, values + kernel.parameters.size()}, stream});
  }
};

/// Memory of its own; counts what is out.
struct Pool {
  std::vector<char> memory = std::vector<char>(256);
  int64_t asked = 0;
  int out = 0;
  bool empty = false;

  Allocator allocator() { return {allocate, release, this}; }
  static void* allocate(void* self, int32_t type, int32_t index, int64_t bytes, void*) {
    auto& pool = *static_cast<Pool*>(self);
    EXPECT_EQ((Device{type, index}), kGpu);
    pool.asked = bytes;
    pool.out += !pool.empty;
    return pool.empty ? nullptr : pool.memory.data();
  }
  static void release(void* self, int32_t, int32_t, void* memory, void*) {
    auto& pool = *static_cast<Pool*>(self);
    EXPECT_EQ(memory, pool.memory.data());
    --pool.out;
  }
};

class ReplayTest : public testing::Test {
 protected:
  void SetUp() override {
    recording.context = &launcher;
    call.run.stream = &stream;
    call.run.allocator = pool.allocator();
  }
  bool run() { return replay(recording, launcher, key_of(call), kGpu, call.run); }

  Store store;
  Pool pool;
  Noting launcher;
  int stream = 0;
  Forward call = fixed_call(store);
  Recording recording{.backend = "toy",
                      .workspace_bytes = 48,
                      .launches = {{.function = 1,
                                    .parameters = {{Parameter::Kind::tensor, static_cast<uint64_t>(Role::q)},
                                                   {Parameter::Kind::number, 42},
                                                   {Parameter::Kind::workspace, 16}}},
                                   {.function = 2,
                                    .parameters = {{Parameter::Kind::workspace, 0},
                                                   {Parameter::Kind::tensor, static_cast<uint64_t>(Role::sink)},
                                                   {Parameter::Kind::tensor, static_cast<uint64_t>(Role::out)}}}}};
};

TEST_F(ReplayTest, LaunchesOnTheMemoryStreamAndWorkspaceOfTheCall) {
  ASSERT_TRUE(run());
  ASSERT_EQ(launcher.launched.size(), 2u);
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const uint64_t workspace = address(pool.memory.data());
  EXPECT_EQ(launcher.launched[0].function, 1u);
  EXPECT_EQ(launcher.launched[0].values, (std::vector<uint64_t>{address(call.q.data), 42, workspace + 16}));
  EXPECT_EQ(launcher.launched[1].values, (std::vector<uint64_t>{workspace, 0, address(call.out.data)}));
  for (const auto& launched : launcher.launched) EXPECT_EQ(launched.stream, &stream);
  EXPECT_EQ(pool.asked, 48);
  EXPECT_EQ(pool.out, 0) << "given back";
}

TEST_F(ReplayTest, DoesNothingWhereItCannot) {
  launcher.current = nullptr;
  EXPECT_FALSE(run());
  launcher.current = &pool;
  EXPECT_FALSE(run());
  launcher.current = &launcher;
  call.run.allocator = {};
  EXPECT_FALSE(run());
  EXPECT_TRUE(launcher.launched.empty());
  EXPECT_EQ(pool.asked, 0);
  recording.workspace_bytes = 0;
  recording.launches[0].parameters.pop_back();
  recording.launches.pop_back();
  EXPECT_TRUE(run()) << "needs no allocator";
}

TEST_F(ReplayTest, LeavesACallWithoutMemoryToTheEngine) {
  pool.empty = true;
  EXPECT_FALSE(run());
  EXPECT_EQ(pool.asked, 48);
  EXPECT_TRUE(launcher.launched.empty());
  pool.empty = false;
  EXPECT_TRUE(run());
}

TEST_F(ReplayTest, ErrorsLeaveNoMemoryBehind) {
  recording.launches[1].function = 666;
  EXPECT_THROW(run(), Error);
  EXPECT_EQ(pool.out, 0);
}

TEST(RecordingsTest, ForgetsAllWhenThereAreMany) {
  Recordings all(2);
  EXPECT_EQ(all.find("a"), nullptr);
  all.add("a", {.backend = "one"});
  all.add("b", {.backend = "two"});
  const auto kept = all.find("a");
  EXPECT_EQ(kept->backend, "one");
  all.add("c", {.backend = "three"});
  EXPECT_EQ(all.size(), 1u);
  EXPECT_EQ(all.find("a"), nullptr);
  EXPECT_EQ(kept->backend, "one") << "whoever is launching it keeps it";
  all.clear();
  EXPECT_EQ(all.find("c"), nullptr);
}

}  // namespace
}  // namespace flash_attn::test
