// One vector of the instruction set this file is compiled for, on the vector types that GCC and
// Clang share. Everything lives in a namespace named after the instruction set, so that code
// compiled for one is never linked into another.
#ifndef MMLITE_SIMD_H
#define MMLITE_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MMLITE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MMLITE_VECTOR_BYTES 32
#else
#define MMLITE_VECTOR_BYTES 16
#endif

#define MMLITE_INLINE inline __attribute__((always_inline))

namespace MMLITE_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class C>
struct Simd;

template <>
struct Simd<float> {
  typedef int32_t Int;
  typedef float V __attribute__((vector_size(MMLITE_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(MMLITE_VECTOR_BYTES)));
  typedef int64_t Pairs __attribute__((vector_size(MMLITE_VECTOR_BYTES)));  // two lanes in one
  static constexpr int kWidth = MMLITE_VECTOR_BYTES / 4;
};

// Float64 serves gradient checks: four lanes, whatever they are made of.
template <>
struct Simd<double> {
  typedef int64_t Int;
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  static constexpr int kWidth = 4;
};

// ---------------------------------------------------------------- scalars of every dtype

MMLITE_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

MMLITE_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MMLITE_INLINE float widen(float x) { return x; }
MMLITE_INLINE double widen(double x) { return x; }
MMLITE_INLINE float widen(bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
MMLITE_INLINE float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Moving exponent and mantissa into place leaves an exponent 112 too small; the product
  // corrects it, subnormal numbers included.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

MMLITE_INLINE void narrow(float x, float* to) { *to = x; }
MMLITE_INLINE void narrow(double x, double* to) { *to = x; }
MMLITE_INLINE void narrow(float x, bfloat16* to) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  to->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}
MMLITE_INLINE void narrow(float x, float16* to) {
  const uint32_t bits = to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float magnitude = fabsf(x);
  uint16_t half;
  if (x != x) {
    half = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    // One unit of 0.5's mantissa is 2^-24, that of a subnormal: adding rounds to it.
    half = static_cast<uint16_t>(to_bits(magnitude + 0.5f) - to_bits(0.5f));
  } else {
    const uint32_t normal = to_bits(magnitude) - (112u << 23);
    half = static_cast<uint16_t>((normal + 0xfff + ((normal >> 13) & 1)) >> 13);
  }
  to->bits = sign | half;
}

// ---------------------------------------------------------------- loads and stores

template <class V, class From>
MMLITE_INLINE V bit_cast(From from) {
  static_assert(sizeof(V) == sizeof(From), "a bit cast keeps the size");
  V to;
  memcpy(&to, &from, sizeof(V));
  return to;
}

template <class C>
MMLITE_INLINE typename Simd<C>::V broadcast(C x) {
  return x - typename Simd<C>::V{};
}

template <class C>
MMLITE_INLINE typename Simd<C>::V load(const C* from) {
  typename Simd<C>::V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

MMLITE_INLINE Simd<float>::V load(const bfloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(MMLITE_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(MMLITE_VECTOR_BYTES)));
  Half half;
  memcpy(&half, from, sizeof(half));
  return bit_cast<Simd<float>::V>(__builtin_convertvector(half, Wide) << 16);
}

MMLITE_INLINE Simd<float>::V load(const float16* from) {
#if defined(__AVX512F__)
  return (Simd<float>::V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Simd<float>::V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
  typedef __fp16 Half __attribute__((vector_size(MMLITE_VECTOR_BYTES / 2)));
  Half half;
  memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, Simd<float>::V);
#else
  Simd<float>::V v;
  for (int i = 0; i < Simd<float>::kWidth; ++i) v[i] = widen(from[i]);
  return v;
#endif
}

// The first n elements, zeros behind them; reads nothing beyond.
template <class C, class T>
MMLITE_INLINE typename Simd<C>::V load_head(const T* from, int n) {
  typename Simd<C>::V v{};
  for (int i = 0; i < n; ++i) v[i] = widen(from[i]);
  return v;
}

#if defined(__AVX512F__)
template <>
MMLITE_INLINE Simd<float>::V load_head<float, float>(const float* from, int n) {
  return (Simd<float>::V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
}
#endif

template <class C>
MMLITE_INLINE void store(C* to, typename Simd<C>::V v) {
  memcpy(to, &v, sizeof(v));
}

MMLITE_INLINE void store(bfloat16* to, Simd<float>::V v) {
  typedef uint16_t Half __attribute__((vector_size(MMLITE_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(MMLITE_VECTOR_BYTES)));
  const Wide bits = bit_cast<Wide>(v);
  const Wide rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const Wide nan = bit_cast<Wide>(v != v);
  const Wide chosen = ((bits | 0x400000) & nan) | (rounded & ~nan);
  const Half half = __builtin_convertvector(chosen >> 16, Half);
  memcpy(to, &half, sizeof(half));
}

MMLITE_INLINE void store(float16* to, Simd<float>::V v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, 0));
#elif defined(__aarch64__)
  typedef __fp16 Half __attribute__((vector_size(MMLITE_VECTOR_BYTES / 2)));
  const Half half = __builtin_convertvector(v, Half);
  memcpy(to, &half, sizeof(half));
#else
  for (int i = 0; i < Simd<float>::kWidth; ++i) narrow(v[i], to + i);
#endif
}

template <class C, class T>
MMLITE_INLINE void store_head(T* to, typename Simd<C>::V v, int n) {
  for (int i = 0; i < n; ++i) narrow(v[i], to + i);
}

#if defined(__AVX512F__)
template <>
MMLITE_INLINE void store_head<float, float>(float* to, Simd<float>::V v, int n) {
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)v);
}
#endif

// ---------------------------------------------------------------- arithmetic

// Lanes of `v` where the mask is set, zero elsewhere.
template <class C>
MMLITE_INLINE typename Simd<C>::V keep(typename Simd<C>::I mask, typename Simd<C>::V v) {
  typedef typename Simd<C>::V V;
  typedef typename Simd<C>::I I;
  return bit_cast<V>(bit_cast<I>(v) & mask);
}

// Lanes of `v` where the mask is set, of `other` elsewhere.
template <class C>
MMLITE_INLINE typename Simd<C>::V choose(
    typename Simd<C>::I mask, typename Simd<C>::V v, typename Simd<C>::V other) {
  typedef typename Simd<C>::V V;
  typedef typename Simd<C>::I I;
  return bit_cast<V>((bit_cast<I>(v) & mask) | (bit_cast<I>(other) & ~mask));
}

// The larger of two, lane by lane; the second operand where one is not a number.
template <class V>
MMLITE_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// A shuffle of the concatenation (a, b), with constant lane numbers.
#if defined(__clang__)
#define MMLITE_SHUFFLE(C, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMLITE_SHUFFLE(C, a, b, ...) __builtin_shuffle(a, b, typename Simd<C>::I{__VA_ARGS__})
#endif

// Every second lane of (a, b) taken as one long vector, from the first or from the second on.
template <class C, class V = typename Simd<C>::V>
MMLITE_INLINE V even(V a, V b) {
  if constexpr (Simd<C>::kWidth == 16) {
    return MMLITE_SHUFFLE(C, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (Simd<C>::kWidth == 8) {
    return MMLITE_SHUFFLE(C, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return MMLITE_SHUFFLE(C, a, b, 0, 2, 4, 6);
  }
}

template <class C, class V = typename Simd<C>::V>
MMLITE_INLINE V odd(V a, V b) {
  if constexpr (Simd<C>::kWidth == 16) {
    return MMLITE_SHUFFLE(C, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (Simd<C>::kWidth == 8) {
    return MMLITE_SHUFFLE(C, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return MMLITE_SHUFFLE(C, a, b, 1, 3, 5, 7);
  }
}

// The inverse: lanes of `a` and `b` in turn, as two vectors.
template <class C, class V = typename Simd<C>::V>
MMLITE_INLINE void interleave(V a, V b, V* first, V* second) {
  if constexpr (Simd<C>::kWidth == 16) {
    *first = MMLITE_SHUFFLE(C, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *second = MMLITE_SHUFFLE(C, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (Simd<C>::kWidth == 8) {
    *first = MMLITE_SHUFFLE(C, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    *second = MMLITE_SHUFFLE(C, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    *first = MMLITE_SHUFFLE(C, a, b, 0, 4, 1, 5);
    *second = MMLITE_SHUFFLE(C, a, b, 2, 6, 3, 7);
  }
}

// Sums over the lanes of many vectors at once, by adding them in pairs until one is left. First
// four vectors become one, which has a share of each of the four sums in every group of four
// lanes: these shuffles stay within 128 bits, where they are cheapest.
template <class C, class V = typename Simd<C>::V>
MMLITE_INLINE V sum_four(V a, V b, V c, V d) {
  if constexpr (Simd<C>::kWidth == 16) {
#define MMLITE_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define MMLITE_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
    const V ab = MMLITE_SHUFFLE(C, a, b, MMLITE_LOW) + MMLITE_SHUFFLE(C, a, b, MMLITE_HIGH);
    const V cd = MMLITE_SHUFFLE(C, c, d, MMLITE_LOW) + MMLITE_SHUFFLE(C, c, d, MMLITE_HIGH);
#undef MMLITE_LOW
#undef MMLITE_HIGH
    return MMLITE_SHUFFLE(C, ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           MMLITE_SHUFFLE(C, ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else if constexpr (Simd<C>::kWidth == 8) {
    const V ab = MMLITE_SHUFFLE(C, a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                 MMLITE_SHUFFLE(C, a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    const V cd = MMLITE_SHUFFLE(C, c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
                 MMLITE_SHUFFLE(C, c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    return MMLITE_SHUFFLE(C, ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
           MMLITE_SHUFFLE(C, ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  } else {
    const V ab = MMLITE_SHUFFLE(C, a, b, 0, 4, 1, 5) + MMLITE_SHUFFLE(C, a, b, 2, 6, 3, 7);
    const V cd = MMLITE_SHUFFLE(C, c, d, 0, 4, 1, 5) + MMLITE_SHUFFLE(C, c, d, 2, 6, 3, 7);
    return MMLITE_SHUFFLE(C, ab, cd, 0, 1, 4, 5) + MMLITE_SHUFFLE(C, ab, cd, 2, 3, 6, 7);
  }
}

// Then kWidth / 4 of these become one, whose lane i is the sum over vector i.
template <class C, class V = typename Simd<C>::V>
MMLITE_INLINE V join_fours(const V* fours) {
  if constexpr (Simd<C>::kWidth == 16) {
#define MMLITE_LOW 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define MMLITE_HIGH 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
    const V a = MMLITE_SHUFFLE(C, fours[0], fours[1], MMLITE_LOW) +
                MMLITE_SHUFFLE(C, fours[0], fours[1], MMLITE_HIGH);
    const V b = MMLITE_SHUFFLE(C, fours[2], fours[3], MMLITE_LOW) +
                MMLITE_SHUFFLE(C, fours[2], fours[3], MMLITE_HIGH);
    return MMLITE_SHUFFLE(C, a, b, MMLITE_LOW) + MMLITE_SHUFFLE(C, a, b, MMLITE_HIGH);
#undef MMLITE_LOW
#undef MMLITE_HIGH
  } else if constexpr (Simd<C>::kWidth == 8) {
    return MMLITE_SHUFFLE(C, fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           MMLITE_SHUFFLE(C, fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
  } else {
    return fours[0];
  }
}

// Every lane combined with all others: by halves, then by quarters, down to neighbours. All but the
// first shuffles stay within 128 bits here as well.
template <class C, class Combine, class V = typename Simd<C>::V>
MMLITE_INLINE C fold(V v, const Combine& combine) {
  if constexpr (Simd<C>::kWidth == 16) {
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  } else if constexpr (Simd<C>::kWidth == 8) {
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  } else {
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 2, 3, 0, 1));
    v = combine(v, MMLITE_SHUFFLE(C, v, v, 1, 0, 3, 2));
  }
  return v[0];
}

#undef MMLITE_SHUFFLE

template <class C>
MMLITE_INLINE C sum(typename Simd<C>::V v) {
  return fold<C>(v, [](auto a, auto b) { return a + b; });
}

template <class C>
MMLITE_INLINE C largest(typename Simd<C>::V v) {
  return fold<C>(v, [](auto a, auto b) { return larger(a, b); });
}

// Whether a mask is set in any lane.
template <class C>
MMLITE_INLINE bool any(typename Simd<C>::I mask) {
#if defined(__AVX512F__)
  if constexpr (Simd<C>::kWidth == 16) {
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
  }
#elif defined(__AVX2__)
  if constexpr (Simd<C>::kWidth == 8) return _mm256_movemask_ps((__m256)mask) != 0;
#endif
  uint64_t words[sizeof(mask) / 8], found = 0;
  memcpy(words, &mask, sizeof(mask));
  for (uint64_t word : words) found |= word;
  return found != 0;
}

// 2^x to one unit in the last place, for x below 128: round to an integer, a Taylor series for
// the rest, and the integer into the exponent. Where float32 has subnormals it gives 2^-126, and
// zero where it has no number at all: zero times infinity must be NaN. NaN stays NaN.
MMLITE_INLINE Simd<float>::V exp2(Simd<float>::V x) {
  typedef Simd<float>::V V;
  typedef Simd<float>::I I;
  const I representable = ~(x < -150.0f);
  x = larger(broadcast(-126.0f), x);
  const V shifter = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the integer
  const V shifted = x + shifter;
  const V rest = x - (shifted - shifter), square = rest * rest;
  const V low = 1.0f + rest * 6.9314718e-1f, middle = 2.4022651e-1f + rest * 5.5504109e-2f;
  const V high = 9.6181291e-3f + rest * 1.3333558e-3f + square * 1.5403530e-4f;
  const V series = low + square * (middle + square * high);
  const I exponent = (bit_cast<I>(shifted) - 0x4b400000 + 127) << 23;
  return keep<float>(representable, series * bit_cast<V>(exponent));
}

MMLITE_INLINE Simd<double>::V exp2(Simd<double>::V x) {
  for (int i = 0; i < Simd<double>::kWidth; ++i) x[i] = ::exp2(x[i]);
  return x;
}

}  // namespace MMLITE_ISA

#endif
