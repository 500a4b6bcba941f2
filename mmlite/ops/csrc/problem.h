// What the library computes, as Python describes it: plain C, shared with mmlite/ops/cpu.py.
#ifndef MMLITE_PROBLEM_H
#define MMLITE_PROBLEM_H

#include <stdint.h>

// Counts up whenever this file or the meaning of a call changes; mmlite/ops/cpu.py has the same
// number and refuses a library with another.
enum { kInterface = 1 };

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
enum Status { kOk = 0, kBadShapes = 1, kTooLarge = 2, kNoMemory = 3 };

// A tensor whose first three dimensions (batch; token or query; head) may have any stride, in
// elements; the rest of it is packed. No data means that the tensor is not part of the problem.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// One call of either operator. With a query it is key-aware attention (the value is its own key
// where key has no data); without one it is standard attention with given attention weights.
//
// Layouts, D the head dimension: query, output (B, Q, M, D); key, value (B, S, M, D); locations
// (B, Q, M, L, P, 2); weights (B, Q, M, L, P). Gradients have the layout of what they belong to.
// The backward pass takes float32 or float64 throughout.
struct Problem {
  int64_t batch, tokens, queries, heads, dim, levels, points;
  const int64_t* spatial_shapes;  // (L, 2), height and width
  Rows query, key, value, locations, weights, output;
  Rows grad_output, grad_query, grad_key, grad_value, grad_locations, grad_weights;
  int32_t dtype;        // of query, key, value and output
  int32_t point_dtype;  // of locations and weights
  int32_t isa;
  int32_t threads;
};

#endif
