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
  C* size;     // both in turn
  Int* level;
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
// Channels that a task of the split backward pass adds up: a cache line of float32.
constexpr int kBlockDim = 16;

// Keys and values of one head of one sample of the batch: where the rows of its tokens begin, in
// the tensors themselves or in a packed copy. A slice spans less than 2^31 elements.
struct Slice {
  int64_t batch, head;
  const void* key;  // that of the value where they are the same
  const void* value;
  int32_t dtype;  // of these rows: the problem's, or of a packed copy float32 or float64
};

// Where their gradients are summed, laid out like a packed slice; no data for those not asked for.
struct GradSlice {
  void* key;
  void* value;
  void* reference;  // the head's part of that of the reference, (Q, L, 2 or 4)
};

// The numbers of a reference.
inline int64_t reference_size(const Problem& p) { return p.sampling == kFromBoxes ? 4 : 2; }

// What the first half of a split backward pass leaves for the second: for every query of a head
// the attention weights of its points, then their factors of the query in the key's gradient.
// Standard attention has the weights already and needs no such store.
struct Coefficients {
  void* data;

  static int64_t per_query(const Problem& p) { return 2 * p.levels * p.points; }
};

// Which sums a task of the second half adds up.
struct Share {
  int64_t level;
  int32_t first_channel;  // of kBlockDim
  bool of_key;            // of a key of its own
};

// `table` is a FloatTable, or for float64 (which only the baseline serves) a DoubleTable.
struct Kernels {
  // Copies rows of a head out of the tensors, widened, `stride` elements from one to the next.
  void (*pack)(const Problem& p, const Rows& from, int64_t batch, int64_t head, int64_t begin,
               int64_t end, void* to, int64_t stride);
  // Writes gradients back, narrowed; `to` has the channels from `first_channel` on.
  void (*unpack)(const Problem& p, const Rows& to, int64_t batch, int64_t head, int64_t begin,
                 int64_t end, const void* from, int64_t stride, int32_t first_channel,
                 int32_t channels);
  void (*forward)(const Problem& p, const void* table, const Slice& slice, int64_t q_begin,
                  int64_t q_end);
  // All gradients of these queries; those of key and value are added to `grads`, or where
  // `coefficients` has data left to `scatter`.
  void (*backward)(const Problem& p, const void* table, const Slice& slice, const GradSlice& grads,
                   const Coefficients& coefficients, int64_t q_begin, int64_t q_end,
                   void* scratch);
  int64_t (*backward_scratch_bytes)(const Problem& p);
  // Adds up one share of a head's gradients from all its queries. Here the table has kChunk
  // points of each level.
  void (*scatter)(const Problem& p, const void* table, const Slice& slice,
                  const Coefficients& coefficients, const Share& share, void* grads);
};

extern const Kernels kBaselineKernels;
#if defined(MMLITE_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

#endif
