// What the library computes, as Python describes it: plain C, shared with mmlite/ops/cpu.py.
#ifndef MMLITE_PROBLEM_H
#define MMLITE_PROBLEM_H

#include <stdint.h>

// Counts up whenever this file or the meaning of a call changes; mmlite/ops/cpu.py has the same
// number and refuses a library with another.
enum { kInterface = 3 };

// Standard attention has its weights given; key-aware attention forms them from a query and a key,
// which is the value itself where it is shared.
enum Operator { kStandard = 0, kKeyAware = 1, kKeyAwareShared = 2 };
// Points are said to be at normalised locations, or offset from a reference point (x, y) by pixels of
// their level, or from the middle of a box (cx, cy, w, h) by halves of its size over their number.
enum Sampling { kLocations = 0, kFromPoints = 1, kFromBoxes = 2 };
enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
enum Status { kOk = 0, kBadProblem = 1, kBadShapes = 2, kTooLarge = 3, kNoMemory = 4 };

// Bits of Problem::grads.
enum Grad {
  kGradQuery = 1,
  kGradKey = 2,
  kGradValue = 4,
  kGradLocations = 8,
  kGradWeights = 16,
  kGradReference = 32,
};

// A tensor whose first three dimensions (batch; token or query; head) may have any stride, in
// elements; the rest of it is packed.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// One call of either operator.
//
// Layouts, D the head dimension: query, output (B, Q, M, D); key, value (B, S, M, D); locations
// (B, Q, M, L, P, 2), or in their place offsets (B, Q, M, 1 or L, P, 2); weights (B, Q, M, L, P);
// reference (1 or B, Q, L, 2 or 4), its third stride from level to level. Gradients have the layout
// and the dtype of what they belong to. What an operator or a pass does not use may be anything; nor
// is a gradient written that is not asked for.
struct Problem {
  int64_t batch, tokens, queries, heads, dim, levels, points;
  const int64_t* spatial_shapes;  // (L, 2), height and width
  Rows query, key, value, locations, weights, output;
  Rows grad_output, grad_query, grad_key, grad_value, grad_locations, grad_weights;
  // Float64 for float64, otherwise float32; for `reference_batch` images and with offsets for
  // `offset_levels` levels, both either one that serves all or as many as there are.
  Rows reference, grad_reference;
  int64_t reference_batch, offset_levels;
  int32_t op;           // an Operator
  int32_t dtype;        // of query, key, value and output
  int32_t point_dtype;  // of locations or offsets, and weights
  int32_t grads;        // those that the backward pass is asked for, Grad bits
  int32_t isa;
  int32_t threads;
  int32_t sampling;  // a Sampling
};

#endif
