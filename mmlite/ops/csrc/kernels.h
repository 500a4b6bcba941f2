// The kernels of one instruction set, as api.cpp sees them.
#ifndef MMLITE_KERNELS_H
#define MMLITE_KERNELS_H

#include "problem.h"

// The level of every sampling point of a head, point by point; padded to whole chunks of
// kChunk points with a level of one pixel. Made once per call.
template <class C, class Int>
struct PointTable {
  C* width;
  C* height;
  Int* columns;  // the width once more, as an integer
  Int* lines;
  Int* start;  // first token of the level
};

typedef PointTable<float, int32_t> FloatTable;
typedef PointTable<double, int64_t> DoubleTable;

// Points are handled sixteen at a time: one vector of them on the widest machine.
constexpr int kChunk = 16;
// The widest head served.
constexpr int kMaxDim = 256;

// `table` is a FloatTable, or for float64 (which only the baseline serves) a DoubleTable.
struct Kernels {
  void (*forward)(const Problem& p, const void* table, int64_t b, int64_t q_begin, int64_t q_end);
  void (*backward)(const Problem& p, const void* table, int64_t b, int64_t m, void* scratch);
  int64_t (*backward_scratch_bytes)(const Problem& p);
};

extern const Kernels kBaselineKernels;
#if defined(MMLITE_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

#endif
