// Rotary embedding: every kernel against the formula in double, then the driver: positions, strides, tables of
// anything.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "core/row_move.hpp"
#include "cpu/isa.hpp"
#include "cpu/rotary.hpp"
#include "flash_attn/flash_attn.hpp"
#include "support/compare.hpp"
#include "support/draw.hpp"

namespace flash_attn::test {
namespace {

/// Half a unit in the last place of a number of size 1.
double half_unit(DType t) { return t == DType::bf16 ? 0x1p-8 : t == DType::f16 ? 0x1p-11 : 0x1p-23; }

struct Turn {
  int64_t pairs;
  bool interleaved, conjugate;
};

/// Column `col` of a row, turned by row `position` of the tables; position -1: as it is.
template <class Element>
double turned(const Turn& t, const HostTensor& cos, const HostTensor& sin, int64_t position, int64_t col,
              const Element& element) {
  if (position < 0 || col >= 2 * t.pairs) return element(col);
  const int64_t pair = t.interleaved ? col / 2 : col % t.pairs;
  const bool second = t.interleaved ? col % 2 == 1 : col >= t.pairs;
  const int64_t other = t.interleaved ? col ^ 1 : (second ? col - t.pairs : col + t.pairs);
  const double c = cos.at(position, pair), s = (t.conjugate ? -1 : 1) * sin.at(position, pair);
  return second ? element(other) * s + element(col) * c : element(col) * c - element(other) * s;
}

struct Mover {
  std::string name;
  MoveRow move;
};
std::vector<Mover> movers() {
  std::vector<Mover> all{{"plain", move_row}};
  for (const cpu::Kernels* k : cpu::usable_kernels()) all.push_back({k->name, k->move_row});
  return all;
}
class EveryMover : public ::testing::TestWithParam<Mover> {};

TEST_P(EveryMover, TurnsARowOfHeads) {
  for (uint64_t seed = 0; seed < 400; ++seed) {
    Draw draw(seed);
    const DType dtype = draw.of({DType::f32, DType::bf16, DType::f16});
    const int64_t heads = draw.between(1, 4), cols = draw.one_in(3) ? draw.between(1, 600) : draw.between(1, 70);
    const Turn turn{draw.one_in(2) ? cols / 2 : draw.between(0, cols / 2), draw.one_in(2), draw.one_in(2)};
    const Layout strided{.order = draw.one_in(3) ? std::vector<int>{1, 0} : std::vector<int>{},
                         .step = draw.one_in(4) ? 3 : 1,
                         .pad = draw.between(0, 3)};
    const HostTensor x = HostTensor::normal(dtype, {heads, cols}, seed, 1.0, strided);
    const Layout of_table{.step = draw.of({int64_t{1}, int64_t{2}})};
    const auto table = [&](uint64_t of) {
      return HostTensor::normal(draw.of({DType::f32, DType::bf16, DType::f16}), {1, std::max<int64_t>(turn.pairs, 1)},
                                of, 1.0, of_table);
    };
    const HostTensor cos = table(seed + 1000), sin = table(seed + 2000);
    const bool in_place = draw.one_in(2);
    HostTensor result = in_place ? x : draw.one_in(2) ? x.like() : HostTensor(dtype, {heads, cols});
    const Tensor from = in_place ? result.tensor() : x.tensor(), into = result.tensor();
    GetParam().move({.dtype = dtype,
                     .heads = heads,
                     .cols = cols,
                     .from = static_cast<const char*>(from.data),
                     .into = static_cast<char*>(into.data),
                     .from_head = from.stride[0],
                     .from_col = from.stride[1],
                     .into_head = into.stride[0],
                     .into_col = into.stride[1],
                     .angles = {.cos = static_cast<const char*>(cos.tensor().data),
                                .sin = static_cast<const char*>(sin.tensor().data),
                                .cos_dtype = cos.dtype(),
                                .sin_dtype = sin.dtype(),
                                .cos_stride = cos.tensor().stride[1],
                                .sin_stride = sin.tensor().stride[1],
                                .pairs = turn.pairs,
                                .interleaved = turn.interleaved,
                                .conjugate = turn.conjugate}});
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < cols; ++c) {
        const auto element = [&](int64_t i) { return x.at(h, i); };
        const double want = turned(turn, cos, sin, 0, c, element);
        // Beside the rounding of the result, two products and a sum of numbers up to 5 or so are rounded to fp32.
        ASSERT_NEAR(result.at(h, c), want, half_unit(dtype) * std::abs(want) + 25 * 0x1p-23) << "seed " << seed;
        if (c >= 2 * turn.pairs) {
          ASSERT_EQ(result.at(h, c), want);
        }
      }
    EXPECT_TRUE(result.gaps_untouched()) << "seed " << seed;
  }
}

TEST_P(EveryMover, TouchesNothingBeyondARow) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  char* const memory =
      static_cast<char*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(memory + page, page, PROT_NONE), 0);  // reading or writing here ends the test
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t cols = 1; cols <= 100; ++cols)
      for (bool interleaved : {false, true}) {
        char* const row = memory + page - static_cast<std::size_t>(cols) * size_of(dtype);
        const int64_t pairs = cols / 2;
        const char* const table = memory + page - static_cast<std::size_t>(pairs) * size_of(dtype);
        GetParam().move({dtype,
                         1,
                         cols,
                         row,
                         row,
                         cols,
                         1,
                         cols,
                         1,
                         {table, table, dtype, dtype, 1, 1, pairs, interleaved, false}});
      }
  munmap(memory, 2 * page);
}

INSTANTIATE_TEST_SUITE_P(Cpu, EveryMover, ::testing::ValuesIn(movers()),
                         [](const auto& info) { return info.param.name; });

/// A call that owns its tensors, and the position of each of its rows, -1: it does not turn.
struct RotaryCase {
  HostTensor x, out, cos, sin, cu_seqlens, offsets;
  cpu::RotaryCall call;
  Turn turn{};
  std::vector<int64_t> positions;

  void rotate() {
    call.x = x.tensor(), call.out = out.tensor(), call.cos = cos.tensor(), call.sin = sin.tensor();
    call.cu_seqlens = cu_seqlens.tensor(), call.offsets = offsets.tensor();
    call.interleaved = turn.interleaved, call.conjugate = turn.conjugate;
    cpu::rotate(call);
  }
  ::testing::AssertionResult right() const {
    const int64_t cols = x.size(x.tensor().ndim - 1), of_row = x.numel() / static_cast<int64_t>(positions.size());
    HostTensor want = x.like(DType::f64);
    for (int64_t n = 0; n < x.numel(); ++n) {
      const auto element = [&](int64_t col) { return x.get(n - n % cols + col); };
      want.set(n, turned(turn, cos, sin, positions[static_cast<std::size_t>(n / of_row)], n % cols, element));
    }
    return close(out, want, 25 * 0x1p-23, half_unit(x.dtype()));
  }
};

HostTensor longs(const std::vector<int64_t>& values) {
  HostTensor t(DType::i64, {static_cast<int64_t>(values.size())});
  for (std::size_t i = 0; i < values.size(); ++i) t.set(static_cast<int64_t>(i), static_cast<double>(values[i]));
  return t;
}

TEST(Rotary, FollowsOffsetsAndLengths) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Draw draw(seed);
    RotaryCase c;
    const DType dtype = draw.of({DType::f32, DType::bf16, DType::f16});
    const int64_t batch = draw.between(0, 4), heads = draw.between(1, 5), cols = draw.between(1, 40);
    c.turn = {draw.between(0, cols / 2), draw.one_in(2), draw.one_in(2)};
    const bool packed = draw.one_in(2), grouped = draw.one_in(3), several = draw.one_in(2), wide = draw.one_in(2);
    std::vector<int64_t> lengths, offsets, cu(1, draw.one_in(3) ? 2 : 0);
    const int64_t seqlen = draw.between(0, 9), same = draw.between(0, 5);
    for (int64_t b = 0; b < batch; ++b) {
      lengths.push_back(packed ? draw.between(0, 6) : seqlen);
      offsets.push_back(several ? draw.between(0, 9) : same);
      cu.push_back(cu.back() + lengths.back());
    }
    const int64_t total = cu.back() + draw.between(0, 2);
    if (packed) {
      c.positions.assign(static_cast<std::size_t>(total), -1);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < lengths[b]; ++i) c.positions[cu[b] + i] = offsets[b] + i;
    } else {
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < seqlen; ++i) c.positions.push_back(offsets[b] + i);
    }
    Shape shape = packed ? Shape{total} : Shape{batch, seqlen};
    if (grouped) shape.push_back(draw.between(1, 3));
    shape.insert(shape.end(), {heads, cols});
    Layout layout{.pad = draw.between(0, 2)};
    if (draw.one_in(3)) {  // rows inside of heads
      for (int i = 0; i < static_cast<int>(shape.size()); ++i) layout.order.push_back(i);
      std::swap(layout.order[0], layout.order[shape.size() - 2]);
    }
    c.x = HostTensor::normal(dtype, shape, seed, 1.0, layout);
    c.out = draw.one_in(2) ? c.x.like() : HostTensor(dtype, shape);
    c.cos = HostTensor::normal(DType::f32, {18, c.turn.pairs}, seed + 1000);
    c.sin = HostTensor::normal(DType::f32, {18, c.turn.pairs}, seed + 2000);
    const auto table = [&](const std::vector<int64_t>& values) {
      return wide ? longs(values) : HostTensor::ints({values.begin(), values.end()});
    };
    if (packed) c.cu_seqlens = table(cu);
    if (several) c.offsets = table(offsets);
    c.call.offset = same;
    c.rotate();
    if (c.x.numel() > 0) {
      EXPECT_TRUE(c.right()) << "seed " << seed;
    }
    EXPECT_TRUE(c.out.gaps_untouched());
  }
}

/// Rows whose position has no angles, by whatever the tables hold, do not turn, and nothing outside is read.
TEST(Rotary, TablesMayHoldAnything) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();
  const int64_t values[] = {0, 1, 3, 4, -1, -7, 100, kMost, kLeast, kMost - 2, kLeast + 2};
  for (uint64_t seed = 0; seed < 500; ++seed) {
    Draw draw(seed);
    RotaryCase c;
    const bool packed = draw.one_in(2);
    c.turn = {2, false, false};
    c.x = HostTensor::normal(DType::f32, packed ? Shape{7, 2, 5} : Shape{3, 4, 2, 5}, seed);
    c.out = c.x.like();
    c.cos = HostTensor::normal(DType::f32, {draw.between(0, 5), 2}, seed), c.sin = c.cos;
    HostTensor cu(DType::i64, {4}), offsets(DType::i64, {3});
    const auto anything = [&](const HostTensor& t) {
      auto* const to = static_cast<int64_t*>(t.tensor().data);
      for (int64_t i = 0; i < t.numel(); ++i) to[i] = values[draw.between(0, std::size(values) - 1)];
    };
    anything(cu), anything(offsets);
    if (packed) c.cu_seqlens = cu;
    if (draw.one_in(2))
      c.offsets = offsets;
    else
      c.call.offset = values[draw.between(0, std::size(values) - 1)];
    c.rotate();
    for (int64_t n = 0; n < c.out.numel(); ++n) ASSERT_FALSE(std::isnan(c.out.get(n)));
  }
}

TEST(Rotary, ThreadsDoNotChangeABit) {
  RotaryCase c;
  c.turn = {20, true, false};
  c.x = HostTensor::normal(DType::bf16, {2, 300, 3, 48}, 1);
  c.cos = HostTensor::normal(DType::bf16, {300, 20}, 2), c.sin = HostTensor::normal(DType::bf16, {300, 20}, 3);
  c.out = c.x.like();
  set_num_threads(1);
  c.rotate();
  const HostTensor one = c.out;
  for (int threads : {2, 3, 8}) {
    c.out = c.x.like();
    set_num_threads(threads);
    c.rotate();
    EXPECT_TRUE(close(c.out, one, 0.0));
  }
  set_num_threads(0);
}

TEST(Rotary, RefusesWhatDoesNotFit) {
  const auto refused = [](const auto& spoil) {
    RotaryCase c;
    c.x = HostTensor::normal(DType::f32, {2, 3, 2, 8}, 1), c.out = c.x.like();
    c.cos = HostTensor::normal(DType::f32, {3, 4}, 1), c.sin = c.cos;
    spoil(c);
    EXPECT_THROW(c.rotate(), Error);
    EXPECT_TRUE(all_equal(c.out, NAN));
  };
  refused([](RotaryCase& c) { c.x = HostTensor(DType::f64, {2, 3, 2, 8}); });
  refused([](RotaryCase& c) { c.x = HostTensor(DType::f32, {6, 2, 8}); });
  refused([](RotaryCase& c) { c.out = HostTensor(DType::f32, {2, 3, 2, 7}); });
  refused([](RotaryCase& c) { c.out = HostTensor(DType::bf16, {2, 3, 2, 8}); });
  refused([](RotaryCase& c) { c.sin = HostTensor(DType::f32, {2, 4}); });
  refused([](RotaryCase& c) { c.cos = c.sin = HostTensor(DType::f32, {3, 5}); });
  refused([](RotaryCase& c) { c.cos = HostTensor(DType::f64, {3, 4}); });
  refused([](RotaryCase& c) { c.offsets = HostTensor::ints({1, 2, 3}); });
  refused([](RotaryCase& c) { c.offsets = HostTensor(DType::f32, {2}); });
  refused([](RotaryCase& c) { c.cu_seqlens = HostTensor::ints({0, 2}, {1, 2}); });
}

}  // namespace
}  // namespace flash_attn::test
