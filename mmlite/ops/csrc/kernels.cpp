// Compiled once per instruction set, with MMLITE_ISA naming it: instantiates the templates for
// every dtype and for the usual head dimensions.
#include "backward.h"
#include "forward.h"

namespace MMLITE_ISA {
namespace {

template <class T, class C>
void forward_any_dim(const Problem& p, const void* table, const Slice& slice, int64_t q_begin,
                     int64_t q_end) {
  const Table<C>& points = *static_cast<const Table<C>*>(table);
  constexpr int kWidth = Simd<C>::kWidth;
  switch (p.dim) {
    case 16:
      return forward_rows<T, C, 16 / kWidth>(p, points, slice, q_begin, q_end);
    case 32:
      return forward_rows<T, C, 32 / kWidth>(p, points, slice, q_begin, q_end);
    case 64:
      return forward_rows<T, C, 64 / kWidth>(p, points, slice, q_begin, q_end);
    default:
      return forward_rows<T, C, 0>(p, points, slice, q_begin, q_end);
  }
}

void forward(const Problem& p, const void* table, const Slice& slice, int64_t q_begin,
             int64_t q_end) {
  switch (p.dtype) {
    case kFloat32:
      return forward_any_dim<float, float>(p, table, slice, q_begin, q_end);
    case kBfloat16:
      return forward_any_dim<bfloat16, float>(p, table, slice, q_begin, q_end);
    case kFloat16:
      return forward_any_dim<float16, float>(p, table, slice, q_begin, q_end);
#if defined(MMLITE_WITH_FLOAT64)
    case kFloat64:
      return forward_rows<double, double, 0>(
          p, *static_cast<const DoubleTable*>(table), slice, q_begin, q_end);
#endif
  }
}

void backward(const Problem& p, const void* table, const Slice& slice, const GradSlice& grads,
              void* scratch) {
#if defined(MMLITE_WITH_FLOAT64)
  if (p.dtype == kFloat64) {
    return backward_slice<double, 0>(
        p, *static_cast<const DoubleTable*>(table), slice, grads, scratch);
  }
#endif
  const FloatTable& points = *static_cast<const FloatTable*>(table);
  constexpr int kWidth = Simd<float>::kWidth;
  switch (p.dim) {
    case 16:
      return backward_slice<float, 16 / kWidth>(p, points, slice, grads, scratch);
    case 32:
      return backward_slice<float, 32 / kWidth>(p, points, slice, grads, scratch);
    case 64:
      return backward_slice<float, 64 / kWidth>(p, points, slice, grads, scratch);
    default:
      return backward_slice<float, 0>(p, points, slice, grads, scratch);
  }
}

}  // namespace
}  // namespace MMLITE_ISA

const Kernels MMLITE_KERNELS = {
    MMLITE_ISA::forward, MMLITE_ISA::backward, MMLITE_ISA::backward_scratch_bytes};
