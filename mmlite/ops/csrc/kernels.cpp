// Compiled once per instruction set, with MMLITE_ISA naming it: instantiates the templates for
// every dtype and for the usual head dimensions.
#include "backward.h"
#include "forward.h"
#include "packing.h"

namespace MMLITE_ISA {
namespace {

// Calls body(zero of the compute type), and of the type of `dtype` behind it.
template <class Body>
void with_types(int32_t dtype, const Body& body) {
  switch (dtype) {
    case kFloat32:
      return body(float(), float());
    case kBfloat16:
      return body(float(), bfloat16());
    case kFloat16:
      return body(float(), float16());
#if defined(MMLITE_WITH_FLOAT64)
    case kFloat64:
      return body(double(), double());
#endif
  }
}

// Calls body(std::integral_constant of the vectors of a row), zero for all but the usual sizes.
template <class C, class Body>
void with_vectors(int64_t dim, const Body& body) {
  constexpr int kWidth = Simd<C>::kWidth;
  if constexpr (sizeof(C) == 4) {
    switch (dim) {
      case 16:
        return body(std::integral_constant<int, 16 / kWidth>());
      case 32:
        return body(std::integral_constant<int, 32 / kWidth>());
      case 64:
        return body(std::integral_constant<int, 64 / kWidth>());
    }
  }
  body(std::integral_constant<int, 0>());
}

void pack(const Problem& p, const Rows& from, int64_t batch, int64_t head, int64_t begin,
          int64_t end, void* to, int64_t stride) {
  with_types(p.dtype, [&](auto compute, auto stored) {
    typedef decltype(compute) C;
    with_vectors<C>(p.dim, [&](auto vectors) {
      pack_rows<decltype(stored), C, vectors>(
          p, from, batch, head, begin, end, static_cast<C*>(to), stride);
    });
  });
}

void unpack(const Problem& p, const Rows& to, int64_t batch, int64_t head, int64_t begin,
            int64_t end, const void* from, int64_t stride, int32_t first_channel,
            int32_t channels) {
  with_types(p.dtype, [&](auto compute, auto stored) {
    typedef decltype(compute) C;
    unpack_rows<decltype(stored)>(to, batch, head, begin, end, static_cast<const C*>(from),
                                  stride, first_channel, channels);
  });
}

void forward(const Problem& p, const void* table, const Slice& slice, int64_t q_begin,
             int64_t q_end) {
  with_types(slice.dtype, [&](auto compute, auto stored) {
    typedef decltype(compute) C;
    with_vectors<C>(p.dim, [&](auto vectors) {
      forward_rows<decltype(stored), C, vectors>(
          p, *static_cast<const Table<C>*>(table), slice, q_begin, q_end);
    });
  });
}

template <class Body>
void with_compute_type([[maybe_unused]] const Problem& p, const Body& body) {
#if defined(MMLITE_WITH_FLOAT64)
  if (p.dtype == kFloat64) return body(double());
#endif
  body(float());
}

void backward(const Problem& p, const void* table, const Slice& slice, const GradSlice& grads,
              const Coefficients& coefficients, int64_t q_begin, int64_t q_end, void* scratch) {
  with_compute_type(p, [&](auto compute) {
    typedef decltype(compute) C;
    const Table<C>& points = *static_cast<const Table<C>*>(table);
    with_vectors<C>(p.dim, [&](auto vectors) {
      if (p.grads & (kGradLocations | kGradReference)) {
        backward_rows<C, vectors, true>(
            p, points, slice, grads, coefficients, q_begin, q_end, scratch);
      } else {
        backward_rows<C, vectors, false>(
            p, points, slice, grads, coefficients, q_begin, q_end, scratch);
      }
    });
  });
}

void scatter(const Problem& p, const void* table, const Slice& slice,
             const Coefficients& coefficients, const Share& share, void* grads) {
  with_compute_type(p, [&](auto compute) {
    typedef decltype(compute) C;
    const Table<C>& levels = *static_cast<const Table<C>*>(table);
    C* const to = static_cast<C*>(grads);
    switch (p.op) {
      case kStandard:
        return scatter_share<C, kStandard>(p, levels, slice, coefficients, share, to);
      case kKeyAware:
        return scatter_share<C, kKeyAware>(p, levels, slice, coefficients, share, to);
      case kKeyAwareShared:
        return scatter_share<C, kKeyAwareShared>(p, levels, slice, coefficients, share, to);
    }
  });
}

}  // namespace
}  // namespace MMLITE_ISA

const Kernels MMLITE_KERNELS = {MMLITE_ISA::pack,     MMLITE_ISA::unpack,
                                MMLITE_ISA::forward,  MMLITE_ISA::backward,
                                MMLITE_ISA::backward_scratch_bytes, MMLITE_ISA::scatter};
