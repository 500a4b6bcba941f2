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
  Int* start;  // offset of the level's first row in the slice, in elements
  Int* line;   // from one line of the map to the next
  Int stride;  // from one pixel to the next
};

typedef PointTable<float, int32_t> FloatTable;
typedef PointTable<double, int64_t> DoubleTable;

// Points are handled sixteen at a time: one vector of them on the widest machine.
constexpr int kChunk = 16;
// The widest head served.
constexpr int kMaxDim = 256;

// Keys and values of one head of one sample of the batch: where the rows of its tokens begin, in
// the tensors themselves or in a packed copy. A slice spans less than 2^31 elements.
struct Slice {
  int64_t batch, head;
  const void* key;  // that of the value where they are the same
  const void* value;
};

// Where their gradients are summed, laid out like the slice itself.
struct GradSlice {
  void* key;
  void* value;
};

// `table` is a FloatTable, or for float64 (which only the baseline serves) a DoubleTable.
struct Kernels {
  void (*forward)(const Problem& p, const void* table, const Slice& slice, int64_t q_begin,
                  int64_t q_end);
  void (*backward)(const Problem& p, const void* table, const Slice& slice, const GradSlice& grads,
                   void* scratch);
  int64_t (*backward_scratch_bytes)(const Problem& p);
};

extern const Kernels kBaselineKernels;
#if defined(MMLITE_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

#endif
