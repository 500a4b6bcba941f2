// Rows of one head copied together, in the compute type, and their gradients copied back.
#ifndef MMLITE_PACKING_H
#define MMLITE_PACKING_H

#include "sampling.h"

namespace MMLITE_ISA {

template <class T, class C, int kVectors>
void pack_rows(const Problem& p, const Rows& from, int64_t batch, int64_t head, int64_t begin,
               int64_t end, C* to, int64_t stride) {
  constexpr int64_t kTokensAhead = 16;
  const Row<C, kVectors> row(p.dim);
  const Slice slice = {batch, head, nullptr, nullptr, p.dtype};
  for (int64_t token = begin; token < end; ++token) {
    prefetch_row(from, slice, token + kTokensAhead < end ? token + kTokensAhead : token, p.dim,
                 sizeof(T));
    const T* const source = row_of<const T>(from, batch, token, head);
    typename Simd<C>::V numbers[Row<C, kVectors>::kCapacity];
    for (int v = 0; v < row.vectors; ++v) numbers[v] = row.get(source, v);
    for (int v = 0; v < row.vectors; ++v) row.put(to + token * stride, v, numbers[v]);
  }
}

// `channels` of the rows, from `first_channel` on; `from` holds these alone.
template <class T, class C>
void unpack_rows(const Rows& to, int64_t batch, int64_t head, int64_t begin, int64_t end,
                 const C* from, int64_t stride, int64_t first_channel, int64_t channels) {
  const Row<C, 0> row(channels);
  for (int64_t token = begin; token < end; ++token) {
    T* const target = row_of<T>(to, batch, token, head) + first_channel;
    for (int v = 0; v < row.vectors; ++v) row.put(target, v, row.get(from + token * stride, v));
  }
}

}  // namespace MMLITE_ISA

#endif
