// The forward passes. Nothing is materialised beyond sixteen sampled rows on the stack.
#ifndef MMLITE_FORWARD_H
#define MMLITE_FORWARD_H

#include "sampling.h"

namespace MMLITE_ISA {

// The four corners of point i: where their rows begin, and their weights.
template <class C, class T>
struct Corners {
  const T *row0, *row1, *row2, *row3;
  C weight0, weight1, weight2, weight3;

  MMLITE_INLINE Corners(const void* slice, const Chunk<C>& chunk, int i)
      : row0(static_cast<const T*>(slice) + chunk.offset[0][i]),
        row1(static_cast<const T*>(slice) + chunk.offset[1][i]),
        row2(static_cast<const T*>(slice) + chunk.offset[2][i]),
        row3(static_cast<const T*>(slice) + chunk.offset[3][i]),
        weight0(chunk.weight[0][i]),
        weight1(chunk.weight[1][i]),
        weight2(chunk.weight[2][i]),
        weight3(chunk.weight[3][i]) {}
};

// Their combination, vector v of it.
template <class C, int kVectors, class T>
MMLITE_INLINE typename Simd<C>::V blend(
    const Row<C, kVectors>& row, const Corners<C, T>& corners, int v) {
  return (row.get(corners.row0, v) * corners.weight0 + row.get(corners.row1, v) * corners.weight1) +
         (row.get(corners.row2, v) * corners.weight2 + row.get(corners.row3, v) * corners.weight3);
}

// Multiplies the corners' weights by those of their points.
template <class C>
MMLITE_INLINE void scale_weights(Chunk<C>* chunk, const C* weights) {
  for (int i = 0; i < kChunk; i += Simd<C>::kWidth) {
    const typename Simd<C>::V weight = load(weights + i);
    for (int c = 0; c < 4; ++c) store(chunk->weight[c] + i, load(chunk->weight[c] + i) * weight);
  }
}

// Puts `value` into the lanes from `count` on.
template <class C>
MMLITE_INLINE void fill_behind(int count, C value, typename Simd<C>::V* lanes) {
  constexpr int kWidth = Simd<C>::kWidth;
  for (int i = count; i < kChunk; ++i) lanes[i / kWidth][i % kWidth] = value;
}

// The chunks of a head, query after query. Each is located while the one before it is worked on:
// that takes a long chain of operations, which then nothing waits for.
template <class C>
class Chunks {
 public:
  Chunks(const Problem& p, const Table<C>& table, const Slice& slice, int64_t q_begin, int64_t q_end)
      : p_(p), table_(table), slice_(slice), q_(q_begin), q_end_(q_end) {
    locate_next();
  }

  Chunk<C>& next() {
    Chunk<C>& chunk = chunks_[turn_];
    turn_ ^= 1;
    locate_next();
    return chunk;
  }

 private:
  MMLITE_INLINE void locate_next() {
    if (q_ == q_end_) return;
    const int num_points = static_cast<int>(p_.levels * p_.points), rest = num_points - first_;
    const int count = rest < kChunk ? rest : kChunk;
    locate_points(p_, table_, slice_, q_, first_, count, &chunks_[turn_]);
    first_ += kChunk;
    if (first_ >= num_points) first_ = 0, ++q_;
  }

  const Problem& p_;
  const Table<C>& table_;
  const Slice& slice_;
  int64_t q_;  // of the chunk to come
  const int64_t q_end_;
  int first_ = 0;
  int turn_ = 0;
  Chunk<C> chunks_[2];
};

// Logits this close to the reference of the running softmax need no new one (in units of log 2).
constexpr int kWindow = 32;

// Key-aware attention of one head of one query over all its points, sixteen at a time with a
// running softmax: numerators and their sum are kept relative to a reference logit. That is not
// the largest one: finding it is a long chain of dependent operations, and any reference within
// a factor of 2^kWindow is as good. Logits are in units of log 2.
template <class T, class C, int kVectors, bool kShared>
MMLITE_INLINE void key_aware_head(
    const Problem& p, const Slice& slice, int64_t q, C scale, Chunks<C>* chunks) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);

  V query[R::kCapacity], total[R::kCapacity];
  get_row(p, p.query, slice, q, row, 0, row.vectors, query);
  for (int v = 0; v < row.vectors; ++v) {
    query[v] *= scale;
    total[v] = V{};
  }
  const C logit_outside = product_with_zeros<C>(query, row.vectors);
  C reference = 0;
  bool has_reference = false;
  V weight_sums = {};

  for (int first = 0; first < num_points; first += kChunk) {
    const int count = num_points - first < kChunk ? num_points - first : kChunk;
    Chunk<C>& chunk = chunks->next();

    // Sample the keys, and keep them where they are the values too.
    V sampled[kShared ? kChunk : 1][R::kCapacity];
    V fours[kChunk / 4];
    for (int i = 0; i < kChunk; i += 4) {
      V products[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        products[j] = V{};
        if (__builtin_expect(chunk.inside[i + j] != 0, true)) {
          const Corners<C, T> corners(slice.key, chunk, i + j);
          for (int v = 0; v < row.vectors; ++v) {
            const V sample = blend(row, corners, v);
            products[j] += query[v] * sample;
            if (kShared) sampled[i + j][v] = sample;
          }
        } else if (kShared) {
          for (int v = 0; v < row.vectors; ++v) sampled[i + j][v] = V{};
        }
      }
      fours[i / 4] = sum_four<C>(products[0], products[1], products[2], products[3]);
    }

    V logits[kChunk / kWidth];
    typename Simd<C>::I beyond = {};
    for (int i = 0; i < kChunk / kWidth; ++i) {
      typename Simd<C>::I inside;
      memcpy(&inside, chunk.inside + i * kWidth, sizeof(inside));
      logits[i] = join_fours<C>(fours + i * (kWidth / 4)) + keep<C>(~inside, broadcast<C>(logit_outside));
      // True for NaN as well.
      beyond |= ~((logits[i] - reference < C(kWindow)) & (logits[i] - reference > C(-kWindow)));
    }
    if (any<C>(beyond)) {
      if (count < kChunk) fill_behind<C>(count, -C(INFINITY), logits);
      V top = logits[0];
      for (int i = 1; i < kChunk / kWidth; ++i) top = larger(top, logits[i]);
      const C peak = largest<C>(top);
      // Where all logits are minus infinity, the reference is left to the points to come.
      if (peak != -C(INFINITY) && !(has_reference && peak <= reference)) {
        if (has_reference) {
          const C rescale = exp2(broadcast<C>(reference - peak))[0];
          weight_sums *= rescale;
          for (int v = 0; v < row.vectors; ++v) total[v] *= rescale;
        }
        reference = peak;
        has_reference = true;
      }
    } else {
      has_reference = true;
    }
    for (int i = 0; i < kChunk / kWidth; ++i) logits[i] = exp2(logits[i] - reference);
    if (count < kChunk) fill_behind<C>(count, C(0), logits);
    alignas(64) C weights[kChunk];
    for (int i = 0; i < kChunk / kWidth; ++i) {
      weight_sums += logits[i];
      store(weights + i * kWidth, logits[i]);
    }

    if (kShared) {
      V odd_total[R::kCapacity];
      for (int v = 0; v < row.vectors; ++v) odd_total[v] = V{};
      for (int i = 0; i < kChunk; i += 2) {
        for (int v = 0; v < row.vectors; ++v) {
          total[v] += sampled[i][v] * weights[i];
          odd_total[v] += sampled[i + 1][v] * weights[i + 1];
        }
      }
      for (int v = 0; v < row.vectors; ++v) total[v] += odd_total[v];
    } else {
      scale_weights(&chunk, weights);
      for (int i = 0; i < kChunk; ++i) {
        if (!chunk.inside[i]) continue;
        const Corners<C, T> corners(slice.value, chunk, i);
        for (int v = 0; v < row.vectors; ++v) total[v] += blend(row, corners, v);
      }
    }
  }

  const C normaliser = 1 / sum<C>(weight_sums);
  for (int v = 0; v < row.vectors; ++v) total[v] *= normaliser;
  put_row(p, p.output, slice, q, row, total);
}

// Standard attention of one head of one query: the given weights times the bilinear ones.
template <class T, class C, int kVectors>
MMLITE_INLINE void standard_head(
    const Problem& p, const Slice& slice, int64_t q, Chunks<C>* chunks) {
  typedef typename Simd<C>::V V;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);
  const int64_t weight_offset = slice.batch * p.weights.batch_stride + q * p.weights.row_stride +
                                slice.head * p.weights.head_stride;

  V total[R::kCapacity];
  for (int v = 0; v < row.vectors; ++v) total[v] = V{};
  for (int first = 0; first < num_points; first += kChunk) {
    const int count = num_points - first < kChunk ? num_points - first : kChunk;
    Chunk<C>& chunk = chunks->next();
    alignas(64) C buffer[kChunk];
    scale_weights(&chunk, points_of<C>(p.weights.data, p.point_dtype, weight_offset + first, count,
                                       C(0), kChunk, buffer));
#pragma GCC unroll 4
    for (int i = 0; i < kChunk; ++i) {
      if (__builtin_expect(!chunk.inside[i], false)) continue;
      const Corners<C, T> corners(slice.value, chunk, i);
      for (int v = 0; v < row.vectors; ++v) total[v] += blend(row, corners, v);
    }
  }
  put_row(p, p.output, slice, q, row, total);
}

// T is the type of the slice's rows.
template <class T, class C, int kVectors>
void forward_rows(const Problem& p, const Table<C>& table, const Slice& slice, int64_t q_begin,
                  int64_t q_end) {
  const C scale = C(1.4426950408889634) / static_cast<C>(::sqrt(static_cast<double>(p.dim)));
  Chunks<C> chunks(p, table, slice, q_begin, q_end);
  const int64_t size = bytes_of(p.dtype), point_size = bytes_of(p.point_dtype);
  for (int64_t q = q_begin; q < q_end; ++q) {
    const int64_t next = q + kAhead < q_end ? q + kAhead : q;
    prefetch_row(p.locations, slice, next, 2 * num_places(p), point_size);
    prefetch_row(p.output, slice, next, p.dim, size);
    if (p.op == kStandard) {
      prefetch_row(p.weights, slice, next, p.levels * p.points, point_size);
    } else {
      prefetch_row(p.query, slice, next, p.dim, size);
    }
    switch (p.op) {
      case kStandard:
        standard_head<T, C, kVectors>(p, slice, q, &chunks);
        break;
      case kKeyAware:
        key_aware_head<T, C, kVectors, false>(p, slice, q, scale, &chunks);
        break;
      case kKeyAwareShared:
        key_aware_head<T, C, kVectors, true>(p, slice, q, scale, &chunks);
        break;
    }
  }
}

}  // namespace MMLITE_ISA

#endif
