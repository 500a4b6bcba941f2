// The forward passes. Nothing is materialised beyond sixteen sampled rows on the stack.
#ifndef MMLITE_FORWARD_H
#define MMLITE_FORWARD_H

#include "sampling.h"

namespace MMLITE_ISA {

// Bilinear combination of one vector of the four corner rows.
template <class C, int kVectors, class T>
MMLITE_INLINE typename Simd<C>::V blend(
    const Row<C, kVectors>& row, const T* const* corner, const C* weight, int v) {
  return (row.get(corner[0], v) * weight[0] + row.get(corner[1], v) * weight[1]) +
         (row.get(corner[2], v) * weight[2] + row.get(corner[3], v) * weight[3]);
}

// Rows and weights of the corners of point i.
#define MMLITE_CORNERS(T, base, stride, i)                                             \
  {                                                                                    \
    (base) + chunk.row[0][i] * (stride), (base) + chunk.row[1][i] * (stride),          \
        (base) + chunk.row[2][i] * (stride), (base) + chunk.row[3][i] * (stride)       \
  }

// Key-aware attention of one head of one query over all its points, sixteen at a time with a
// running softmax: numerators and their sum are kept relative to the largest logit so far and
// rescaled when a chunk brings a larger one. Logits are in units of log 2.
template <class T, class C, int kVectors, bool kShared>
MMLITE_INLINE void key_aware_head(
    const Problem& p, const Table<C>& table, int64_t b, int64_t q, int64_t m) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);

  const T* const value = row_of<const T>(p.value, b, 0, m);
  const T* const key = kShared ? value : row_of<const T>(p.key, b, 0, m);
  const int64_t value_stride = p.value.row_stride;
  const int64_t key_stride = kShared ? value_stride : p.key.row_stride;
  const int64_t location =
      b * p.locations.batch_stride + q * p.locations.row_stride + m * p.locations.head_stride;

  const C scale = C(1.4426950408889634) / static_cast<C>(::sqrt(static_cast<double>(p.dim)));
  V query[R::kCapacity], total[R::kCapacity], total_odd[R::kCapacity];
  const T* const query_row = row_of<const T>(p.query, b, q, m);
  for (int v = 0; v < row.vectors; ++v) {
    query[v] = row.get(query_row, v) * scale;
    total[v] = total_odd[v] = V{};
  }
  C peak = 0, weight_sum = 0;

  for (int first = 0; first < num_points; first += kChunk) {
    const int count = num_points - first < kChunk ? num_points - first : kChunk;
    Chunk<C> chunk;
    alignas(64) C buffer[2 * kChunk];
    locate(points_of<C>(p.locations.data, p.point_dtype, location + 2 * first, 2 * count,
                        C(NAN), 2 * kChunk, buffer),
           table, first, &chunk);

    // Sample the keys, and keep them where they are the values too.
    V sampled[kShared ? kChunk : 1][R::kCapacity];
    V products[kChunk];
    for (int i = 0; i < kChunk; ++i) {
      V product = {};
      if (chunk.inside[i]) {
        const T* const corner[4] = MMLITE_CORNERS(T, key, key_stride, i);
        const C weight[4] = {chunk.weight[0][i], chunk.weight[1][i], chunk.weight[2][i],
                             chunk.weight[3][i]};
        for (int v = 0; v < row.vectors; ++v) {
          const V sample = blend(row, corner, weight, v);
          product += query[v] * sample;
          if (kShared) sampled[i][v] = sample;
        }
      } else if (kShared) {
        for (int v = 0; v < row.vectors; ++v) sampled[i][v] = V{};
      }
      products[i] = product;
    }

    V logits[kChunk / kWidth];
    const C lowest = -C(INFINITY);
    for (int i = 0; i < kChunk / kWidth; ++i) {
      logits[i] = sum_each<C>(products + i * kWidth);
      if (count < kChunk) {
        for (int j = 0; j < kWidth; ++j) {
          if (i * kWidth + j >= count) logits[i][j] = lowest;
        }
      }
    }
    V top = logits[0];
    for (int i = 1; i < kChunk / kWidth; ++i) top = select<C>(top > logits[i], top, logits[i]);
    C new_peak = largest<C>(top);
    if (first != 0) {
      if (peak > new_peak) new_peak = peak;
      const C rescale = exp2(broadcast<C>(peak - new_peak))[0];
      weight_sum *= rescale;
      for (int v = 0; v < row.vectors; ++v) total[v] *= rescale, total_odd[v] *= rescale;
    }
    peak = new_peak;

    alignas(64) C weights[kChunk];
    V weight_sums = {};
    for (int i = 0; i < kChunk / kWidth; ++i) {
      V weight = exp2(logits[i] - peak);
      if (count < kChunk) {
        for (int j = 0; j < kWidth; ++j) {
          if (i * kWidth + j >= count) weight[j] = 0;
        }
      }
      weight_sums += weight;
      store(weights + i * kWidth, weight);
    }
    weight_sum += sum<C>(weight_sums);

    if (kShared) {
      for (int i = 0; i < kChunk; i += 2) {
        for (int v = 0; v < row.vectors; ++v) {
          total[v] += sampled[i][v] * weights[i];
          total_odd[v] += sampled[i + 1][v] * weights[i + 1];
        }
      }
    } else {
      for (int i = 0; i < count; ++i) {
        if (!chunk.inside[i]) continue;
        const T* const corner[4] = MMLITE_CORNERS(T, value, value_stride, i);
        const C weight[4] = {
            weights[i] * chunk.weight[0][i], weights[i] * chunk.weight[1][i],
            weights[i] * chunk.weight[2][i], weights[i] * chunk.weight[3][i]};
        for (int v = 0; v < row.vectors; ++v) total[v] += blend(row, corner, weight, v);
      }
    }
  }

  T* const output = row_of<T>(p.output, b, q, m);
  const C normaliser = 1 / weight_sum;
  for (int v = 0; v < row.vectors; ++v) row.put(output, v, (total[v] + total_odd[v]) * normaliser);
}

// Standard attention of one head of one query: the given weights times the bilinear ones.
template <class T, class C, int kVectors>
MMLITE_INLINE void standard_head(
    const Problem& p, const Table<C>& table, int64_t b, int64_t q, int64_t m) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);

  const T* const value = row_of<const T>(p.value, b, 0, m);
  const int64_t value_stride = p.value.row_stride;
  const int64_t location =
      b * p.locations.batch_stride + q * p.locations.row_stride + m * p.locations.head_stride;
  const int64_t weight_offset =
      b * p.weights.batch_stride + q * p.weights.row_stride + m * p.weights.head_stride;

  V total[R::kCapacity];
  for (int v = 0; v < row.vectors; ++v) total[v] = V{};
  for (int first = 0; first < num_points; first += kChunk) {
    const int count = num_points - first < kChunk ? num_points - first : kChunk;
    Chunk<C> chunk;
    alignas(64) C buffer[2 * kChunk];
    locate(points_of<C>(p.locations.data, p.point_dtype, location + 2 * first, 2 * count,
                        C(NAN), 2 * kChunk, buffer),
           table, first, &chunk);
    const C* const weights = points_of<C>(
        p.weights.data, p.point_dtype, weight_offset + first, count, C(0), kChunk, buffer);
    for (int i = 0; i < kChunk; i += kWidth) {
      const V weight = load(weights + i);
      for (int c = 0; c < 4; ++c) {
        store(chunk.weight[c] + i, load(chunk.weight[c] + i) * weight);
      }
    }
    for (int i = 0; i < kChunk; ++i) {
      if (!chunk.inside[i]) continue;
      const T* const corner[4] = MMLITE_CORNERS(T, value, value_stride, i);
      const C weight[4] = {chunk.weight[0][i], chunk.weight[1][i], chunk.weight[2][i],
                           chunk.weight[3][i]};
      for (int v = 0; v < row.vectors; ++v) total[v] += blend(row, corner, weight, v);
    }
  }
  T* const output = row_of<T>(p.output, b, q, m);
  for (int v = 0; v < row.vectors; ++v) row.put(output, v, total[v]);
}

template <class T, class C, int kVectors>
void forward_rows(
    const Problem& p, const Table<C>& table, int64_t b, int64_t q_begin, int64_t q_end) {
  for (int64_t m = 0; m < p.heads; ++m) {
    for (int64_t q = q_begin; q < q_end; ++q) {
      if (!p.query.data) {
        standard_head<T, C, kVectors>(p, table, b, q, m);
      } else if (!p.key.data) {
        key_aware_head<T, C, kVectors, true>(p, table, b, q, m);
      } else {
        key_aware_head<T, C, kVectors, false>(p, table, b, q, m);
      }
    }
  }
}

}  // namespace MMLITE_ISA

#endif
