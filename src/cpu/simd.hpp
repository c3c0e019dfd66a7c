// A thin vector of W floats over GNU vector extensions. Included once per instruction set, inside its namespace:
// src/cpu/isa/<isa>.cpp defines FLASH_ATTN_ISA and FLASH_ATTN_WIDTH, then includes the kernels.
//
// Operators (+ - * / < ? :) are the compiler's own. Only what it cannot express well has an intrinsic below.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FLASH_ATTN_INLINE inline __attribute__((always_inline))

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int W = FLASH_ATTN_WIDTH;

/// n rounded up to a multiple of `to`. (A round_up() for all instruction sets would be one copy for all.)
constexpr int64_t pad_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

using vf = float __attribute__((vector_size(4 * W)));
using vi = int32_t __attribute__((vector_size(4 * W)));
using vh = uint16_t __attribute__((vector_size(2 * W)));  // W 16-bit floats
using vq = uint64_t __attribute__((vector_size(4 * W)));  // W / 2 lanes

FLASH_ATTN_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FLASH_ATTN_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
FLASH_ATTN_INLINE vf all(float x) { return x - vf{}; }
FLASH_ATTN_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
FLASH_ATTN_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
FLASH_ATTN_INLINE vf iota() {
  vf x{};
  for (int i = 0; i < W; ++i) x[i] = static_cast<float>(i);
  return x;
}
/// a > b ? a : b, so a NaN in b survives and one in a is lost (the semantics of MAXPS).
FLASH_ATTN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FLASH_ATTN_INLINE vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }

/// Products of the low 32 bits of each lane, in 64.
FLASH_ATTN_INLINE vq multiply_low(vq a, vq b) {
#if !defined(__x86_64__)
  return (a & 0xffffffff) * (b & 0xffffffff);
#elif FLASH_ATTN_WIDTH == 16
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif FLASH_ATTN_WIDTH == 8
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}

/// x where a >= least, else 0; 1 <= least <= 65536.
FLASH_ATTN_INLINE vf where_at_least(vh a, int32_t least, vf x) {
#if FLASH_ATTN_WIDTH == 16
  const __m256i below = _mm256_set1_epi16(static_cast<int16_t>(least - 1));
  return _mm512_maskz_mov_ps(_mm256_cmpgt_epu16_mask(reinterpret_cast<__m256i>(a), below), x);
#else
  return __builtin_convertvector(a, vi) >= least ? x : vf{};
#endif
}

/// x with each lane added to the one kBy behind it.
template <int kBy, int... kLane>
FLASH_ATTN_INLINE vf add_turned(vf x, std::integer_sequence<int, kLane...>) {
  return x + __builtin_shufflevector(x, x, ((kLane + kBy) % W)...);
}
/// The sum of all lanes, by halves.
FLASH_ATTN_INLINE float sum_lanes(vf x) {
  constexpr auto kLanes = std::make_integer_sequence<int, W>{};
  if constexpr (W > 8) x = add_turned<8>(x, kLanes);
  if constexpr (W > 4) x = add_turned<4>(x, kLanes);
  return add_turned<1>(add_turned<2>(x, kLanes), kLanes)[0];
}

#if FLASH_ATTN_WIDTH == 16
/// t - floor(t), in [0, 1).
FLASH_ATTN_INLINE vf fraction(vf t) { return _mm512_reduce_ps(t, 1); }
/// x * 2^floor(t) for t <= 127; 0 where t < -126 (whatever x is there), so that no denormal is ever made.
FLASH_ATTN_INLINE vf scale_by_floor(vf x, vf t) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), x, t);
}
#else
#if FLASH_ATTN_WIDTH == 8
FLASH_ATTN_INLINE vf floor(vf x) { return _mm256_floor_ps(x); }
#else
/// For |x| < 2^22: adding 1.5 * 2^23 leaves no bits below one. May be one less than the floor of a whole number.
FLASH_ATTN_INLINE vf floor(vf x) { return ((x - 0.5f) + 12582912.0f) - 12582912.0f; }
#endif
FLASH_ATTN_INLINE vf fraction(vf t) { return t - floor(t); }
FLASH_ATTN_INLINE vf scale_by_floor(vf x, vf t) {
  using vu = uint32_t __attribute__((vector_size(4 * W)));  // unsigned: floors far below -126 wrap, and are not used
  const vu exponent = reinterpret_cast<vu>(__builtin_convertvector(floor(t), vi)) << 23;
  const vf scaled = reinterpret_cast<vf>(reinterpret_cast<vu>(x) + exponent);
  const vf nan_or_scaled = t == t ? scaled : t;
  return t < all(-126.0f) ? vf{} : nan_or_scaled;
}
#endif

/// 2^t, t <= 127. Relative error 1.5e-7; 0 below 2^-126; NaN stays NaN. Degree-5 minimax on [0, 1], exact at both ends:
/// a score that is its row's maximum is often just below it, by a rounding, and has p = 1 all the same.
FLASH_ATTN_INLINE vf exp2(vf t) {
  const vf f = fraction(t);
  vf p = all(0x1.eca65p-10f);
  p = p * f + 0x1.269d3p-7f;
  p = p * f + 0x1.c94428p-5f;
  p = p * f + 0x1.ebd8aep-3f;
  p = p * f + 0x1.62e4c8p-1f;
  p = p * f + 1.0f;
  return scale_by_floor(p, t);
}

/// tanh x. Near 0 an odd polynomial (minimax on |x| < 0.625, relative 4e-9), elsewhere (1 - e^-2x) / (1 + e^-2x).
FLASH_ATTN_INLINE vf tanh(vf x) {
  const vf a = abs(x);
  const vf z = a * a;
  vf p = all(-0.005704984068870544f);
  p = p * z + 0.0206390842795372f;
  p = p * z - 0.05373971536755562f;
  p = p * z + 0.13331441581249237f;
  p = p * z - 0.3333328068256378f;
  const vf near_zero = x + x * z * p;
  const vf clamped = a > all(10.0f) ? all(10.0f) : a;            // tanh(10) is 1 in fp32; a NaN stays
  const vf e = exp2(clamped * static_cast<float>(-2 * kLog2e));  // e^(-2a), in (0, 1]
  const vf far = (1.0f - e) / (1.0f + e);
  const vf signed_far = as_float(as_int(far) | (as_int(x) & static_cast<int32_t>(0x80000000)));
  return a < all(0.625f) ? near_zero : signed_far;
}

// ---- 16-bit floats ---------------------------------------------------------------------------------------------

FLASH_ATTN_INLINE vh load_half(const void* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FLASH_ATTN_INLINE void store_half(void* p, vh x) { std::memcpy(p, &x, sizeof x); }

// gcc 12 widens and narrows 16 lanes by halves, in five instructions, unless asked for the one that does it.
#if FLASH_ATTN_WIDTH == 16
FLASH_ATTN_INLINE vi widen(vh x) { return reinterpret_cast<vi>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x))); }
FLASH_ATTN_INLINE vh narrow(vi x) { return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x))); }
#else
FLASH_ATTN_INLINE vi widen(vh x) { return __builtin_convertvector(x, vi); }
FLASH_ATTN_INLINE vh narrow(vi x) { return __builtin_convertvector(x, vh); }
#endif

FLASH_ATTN_INLINE vf from_bf16(vh x) { return as_float(widen(x) << 16); }

/// Round to nearest even; a NaN keeps its sign and becomes quiet.
FLASH_ATTN_INLINE vh to_bf16(vf x) {
  const vi b = as_int(x);
  const vi rounded = b + 0x7fff + ((b >> 16) & 1);
  const vi bits = x == x ? rounded : (b | 0x400000);
  return narrow(bits >> 16);
}

#if defined(__F16C__)
#if FLASH_ATTN_WIDTH == 16
FLASH_ATTN_INLINE vf from_f16(vh x) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x)); }
FLASH_ATTN_INLINE vh to_f16(vf x) { return reinterpret_cast<vh>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
FLASH_ATTN_INLINE vf from_f16(vh x) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x)); }
FLASH_ATTN_INLINE vh to_f16(vf x) { return reinterpret_cast<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#endif
#else
/// Shift the 15 magnitude bits under fp32's exponent and rebias by multiplying with 2^112: exact, subnormals included.
FLASH_ATTN_INLINE vf from_f16(vh x) {
  const vi h = widen(x);
  const vi magnitude = h & 0x7fff;
  const vf finite = as_float(magnitude << 13) * 0x1p112f;
  const vf special = as_float((magnitude << 13) | 0x7f800000);
  const vf value = magnitude >= 0x7c00 ? special : finite;
  return as_float(as_int(value) | ((h & 0x8000) << 16));
}
/// Normal results round in integers; subnormal ones by adding 1/2, whose last place is 2^-24, fp16's smallest step.
FLASH_ATTN_INLINE vh to_f16(vf x) {
  const vi sign = (as_int(x) >> 16) & 0x8000;
  const vi b = as_int(abs(x));
  const vi normal = (b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13;
  const vi subnormal = as_int(abs(x) + 0.5f) - 0x3f000000;
  vi r = b < 0x38800000 ? subnormal : normal;
  r = b >= 0x477ff000 ? (vi{} + 0x7c00) : r;
  r = b > 0x7f800000 ? (vi{} + 0x7e00) : r;
  return narrow(r | sign);
}
#endif

/// W doubles in fp32, zeros beyond n. A finite number stays finite.
FLASH_ATTN_INLINE vf load_doubles(const char* p, int64_t stride, int64_t n) {
  constexpr double kMost = __FLT_MAX__;
  float lanes[W] = {};
  for (int64_t i = 0; i < n && i < W; ++i) {
    double x;
    std::memcpy(&x, p + i * stride * 8, sizeof x);
    const bool beyond = __builtin_isfinite(x) && __builtin_fabs(x) > kMost;
    lanes[i] = static_cast<float>(beyond ? __builtin_copysign(kMost, x) : x);
  }
  return load(lanes);
}

/// cols values of a row of `dtype` to fp32 and back; the last vector is cut, never read or written past the row.
FLASH_ATTN_INLINE vf load_as_float(const char* p, DType dtype, int64_t stride, int64_t n) {
  if (dtype == DType::f64) return load_doubles(p, stride, n);
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  alignas(64) char buffer[4 * W] = {};
  if (n < W || stride != 1) {
    if (n > W) n = W;
    for (int64_t i = 0; i < n; ++i) std::memcpy(buffer + i * size, p + i * stride * size, static_cast<size_t>(size));
    p = buffer;
  }
  if (dtype == DType::f32) return load(reinterpret_cast<const float*>(p));
  return dtype == DType::bf16 ? from_bf16(load_half(p)) : from_f16(load_half(p));
}

FLASH_ATTN_INLINE void store_from_float(char* p, vf x, DType dtype, int64_t stride, int64_t n) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  alignas(64) char buffer[4 * W];
  const bool whole = n >= W && stride == 1;
  char* to = whole ? p : buffer;
  if (dtype == DType::f32)
    store(reinterpret_cast<float*>(to), x);
  else
    store_half(to, dtype == DType::bf16 ? to_bf16(x) : to_f16(x));
  if (whole) return;
  if (n > W) n = W;
  for (int64_t i = 0; i < n; ++i) std::memcpy(p + i * stride * size, buffer + i * size, static_cast<size_t>(size));
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
