// The best instruction set of the machine this runs on.
#ifndef MMLITE_ISA_H
#define MMLITE_ISA_H

#include "problem.h"

#if defined(MMLITE_X86)
#include <cpuid.h>

// Asked of the processor itself: the compiler's own __builtin_cpu_supports answers nothing where a
// linker leaves its constructor out.
inline Isa detect_isa() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kBaseline;
  constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr unsigned kWanted = kFma | kOsxsave | kAvx | kF16c;
  if ((c & kWanted) != kWanted) return kBaseline;
  // Registers that the operating system does not save are as good as not there.
  unsigned saved, high;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kYmm = 0x06, kZmm = 0xe6;
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kBaseline;
  if (!(b & 1u << 5)) return kBaseline;                                // AVX2
  constexpr unsigned kAll = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // AVX-512 F, DQ, BW, VL
  return (saved & kZmm) == kZmm && (b & kAll) == kAll ? kAvx512 : kAvx2;
}
#else
inline Isa detect_isa() { return kBaseline; }
#endif

inline Isa best_isa() {
  static const Isa best = detect_isa();
  return best;
}

#endif
