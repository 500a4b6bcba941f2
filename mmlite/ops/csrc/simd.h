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
  static constexpr int kWidth = MMLITE_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef int64_t Int;
  typedef double V __attribute__((vector_size(MMLITE_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(MMLITE_VECTOR_BYTES)));
  static constexpr int kWidth = MMLITE_VECTOR_BYTES / 8;
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

template <class C>
MMLITE_INLINE typename Simd<C>::V select(
    typename Simd<C>::I mask, typename Simd<C>::V yes, typename Simd<C>::V no) {
  typedef typename Simd<C>::V V;
  typedef typename Simd<C>::I I;
  return bit_cast<V>((bit_cast<I>(yes) & mask) | (bit_cast<I>(no) & ~mask));
}

// Every second lane of (a, b) taken as one long vector, from the first or from the second on.
#if defined(__clang__)
#define MMLITE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMLITE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

MMLITE_INLINE Simd<float>::V even(Simd<float>::V a, Simd<float>::V b) {
  typedef Simd<float>::I I;
  (void)sizeof(I);
#if MMLITE_VECTOR_BYTES == 64
  return MMLITE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif MMLITE_VECTOR_BYTES == 32
  return MMLITE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return MMLITE_SHUFFLE(a, b, 0, 2, 4, 6);
#endif
}

MMLITE_INLINE Simd<float>::V odd(Simd<float>::V a, Simd<float>::V b) {
  typedef Simd<float>::I I;
  (void)sizeof(I);
#if MMLITE_VECTOR_BYTES == 64
  return MMLITE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif MMLITE_VECTOR_BYTES == 32
  return MMLITE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return MMLITE_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

#undef MMLITE_SHUFFLE

// Float64 serves gradient checks alone: plain loops will do.
MMLITE_INLINE Simd<double>::V even(Simd<double>::V a, Simd<double>::V b) {
  constexpr int kWidth = Simd<double>::kWidth;
  Simd<double>::V v;
  for (int i = 0; i < kWidth / 2; ++i) v[i] = a[2 * i], v[i + kWidth / 2] = b[2 * i];
  return v;
}

MMLITE_INLINE Simd<double>::V odd(Simd<double>::V a, Simd<double>::V b) {
  constexpr int kWidth = Simd<double>::kWidth;
  Simd<double>::V v;
  for (int i = 0; i < kWidth / 2; ++i) v[i] = a[2 * i + 1], v[i + kWidth / 2] = b[2 * i + 1];
  return v;
}

// Lane i of the result is the sum over the lanes of parts[i]; `parts` holds one vector per lane
// and is overwritten.
template <class C>
MMLITE_INLINE typename Simd<C>::V sum_each(typename Simd<C>::V* parts) {
  for (int n = Simd<C>::kWidth / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) {
      const typename Simd<C>::V a = parts[2 * i], b = parts[2 * i + 1];
      parts[i] = even(a, b) + odd(a, b);
    }
  }
  return parts[0];
}

template <class C>
MMLITE_INLINE C sum(typename Simd<C>::V v) {
  for (int n = Simd<C>::kWidth; n > 1; n /= 2) v = even(v, v) + odd(v, v);
  return v[0];
}

template <class C>
MMLITE_INLINE C largest(typename Simd<C>::V v) {
  for (int n = Simd<C>::kWidth; n > 1; n /= 2) {
    const typename Simd<C>::V a = even(v, v), b = odd(v, v);
    v = select<C>(a > b, a, b);
  }
  return v[0];
}

// 2^x for x <= 0, to one unit in the last place: round to an integer, a Taylor series for the
// rest, and the integer into the exponent. Below -126 it gives 2^-126; NaN stays NaN.
MMLITE_INLINE Simd<float>::V exp2(Simd<float>::V x) {
  typedef Simd<float>::V V;
  typedef Simd<float>::I I;
  const V lowest = broadcast(-126.0f);
  x = select<float>(x < lowest, lowest, x);
  const V shifter = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the integer
  const V shifted = x + shifter;
  const V rest = x - (shifted - shifter);
  V series = broadcast(1.5403530e-4f);
  series = series * rest + 1.3333558e-3f;
  series = series * rest + 9.6181291e-3f;
  series = series * rest + 5.5504109e-2f;
  series = series * rest + 2.4022651e-1f;
  series = series * rest + 6.9314718e-1f;
  series = series * rest + 1.0f;
  const I exponent = (bit_cast<I>(shifted) - 0x4b400000 + 127) << 23;
  return series * bit_cast<V>(exponent);
}

MMLITE_INLINE Simd<double>::V exp2(Simd<double>::V x) {
  for (int i = 0; i < Simd<double>::kWidth; ++i) x[i] = ::exp2(x[i]);
  return x;
}

}  // namespace MMLITE_ISA

#endif
