// One call of an operator as an inference runtime hands it over, checked and run on the CPU kernels:
// what the doors to ONNX Runtime and OpenVINO share. Problem and its enums are those of
// mmlite/ops/csrc/problem.h.
#ifndef MMLITE_ATTENTION_H
#define MMLITE_ATTENTION_H

#include <stdint.h>

#include <vector>

#include "problem.h"

namespace mmlite {

// The domain of the operators in ONNX, and its version.
constexpr char kDomain[] = "mmlite";
constexpr int kDomainVersion = 1;

struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;
};

// Layouts are those of mmlite.ops: query, key and value (B, Q or S, M, D), locations
// (B, Q, M, L, P, 2), weights (B, Q, M, L, P). All packed and of one dtype.
struct Call {
  Operator op;
  Dtype dtype;
  Tensor query, key, value, locations, weights;
  Tensor spatial_shapes;  // int64, (L, 2) or (2 * L), height and width
};

// The shape of the output, (B, Q, M * D). Throws std::invalid_argument with one sentence where the
// inputs do not fit each other, as the PyTorch operators do.
std::vector<int64_t> output_shape(const Call& call);

// Writes the output, on up to `threads` threads. Throws std::invalid_argument, or std::bad_alloc.
void run(const Call& call, void* output, int threads);

}  // namespace mmlite

#endif
