// The backward passes: samples are taken again instead of kept.
//
// With g the gradient of a head's output, w the attention weights and l = scale * <q, k> the
// logits, point by point:
//
//   dw = <g, v>        dl = w * (dw - sum(w * dw))        (softmax)
//   dv = w * g         dk = scale * dl * q                dq = scale * sum(dl * k)
//
// A sample is a bilinear combination of four rows. Each row receives its share of dv and dk, and
// the location receives the inner products of dv and dk with the sample's slopes along x and y.
#ifndef MMLITE_BACKWARD_H
#define MMLITE_BACKWARD_H

#include "sampling.h"

namespace MMLITE_ISA {

enum Product {
  kGradValue,   // <g, v>
  kGradSlopeX,  // <g, slope of v along x>
  kGradSlopeY,
  kQueryKey,  // <q, k>
  kQuerySlopeX,
  kQuerySlopeY,
  kNumProducts
};

// Sixteen points of one head of one query.
template <class C>
struct BackwardChunk {
  Chunk<C> at;
  Cell<C> cell;
  alignas(64) C product[kNumProducts][kChunk];
  alignas(64) C attention[kChunk];  // w
  alignas(64) C grad_key[kChunk];   // scale * dl: the factor of q in dk and of k in dq
  int count;
};

MMLITE_INLINE int64_t padded_dim(int64_t dim) { return (dim + 15) / 16 * 16; }

inline int64_t backward_scratch_bytes(const Problem& p) {
  const int64_t chunks = (p.levels * p.points + kChunk - 1) / kChunk;
  return chunks *
         (sizeof(BackwardChunk<double>) + kChunk * padded_dim(p.dim) * sizeof(double));
}

template <class C, int kVectors, bool kKeyAware, bool kShared>
inline void backward_head(const Problem& p, const Table<C>& table, int64_t b, int64_t q,
                          int64_t m, BackwardChunk<C>* chunks, C* samples) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);
  const int num_chunks = (num_points + kChunk - 1) / kChunk;
  const int64_t sample_size = padded_dim(p.dim);
  alignas(64) static const C zeros[kMaxDim] = {};

  const C* const value = row_of<const C>(p.value, b, 0, m);
  const C* const key = kShared ? value : row_of<const C>(p.key, b, 0, m);
  const int64_t value_stride = p.value.row_stride;
  const int64_t key_stride = kShared ? value_stride : p.key.row_stride;
  const int64_t location =
      b * p.locations.batch_stride + q * p.locations.row_stride + m * p.locations.head_stride;
  const int64_t weight_offset =
      b * p.weights.batch_stride + q * p.weights.row_stride + m * p.weights.head_stride;

  const C scale = C(1) / static_cast<C>(::sqrt(static_cast<double>(p.dim)));
  V query[R::kCapacity], grad[R::kCapacity];
  const C* const grad_row = row_of<const C>(p.grad_output, b, q, m);
  for (int v = 0; v < row.vectors; ++v) grad[v] = row.get(grad_row, v);
  if (kKeyAware) {
    const C* const query_row = row_of<const C>(p.query, b, q, m);
    for (int v = 0; v < row.vectors; ++v) query[v] = row.get(query_row, v);
  }

  for (int n = 0; n < num_chunks; ++n) {
    BackwardChunk<C>& chunk = chunks[n];
    const int first = n * kChunk;
    chunk.count = num_points - first < kChunk ? num_points - first : kChunk;
    alignas(64) C buffer[2 * kChunk];
    locate<C, true>(points_of<C>(p.locations.data, p.point_dtype, location + 2 * first,
                                 2 * chunk.count, C(NAN), 2 * kChunk, buffer),
                    table, first, &chunk.at, &chunk.cell);
    if (!kKeyAware) {
      const C* const weights = points_of<C>(p.weights.data, p.point_dtype, weight_offset + first,
                                            chunk.count, C(0), kChunk, buffer);
      memcpy(chunk.attention, weights, sizeof(chunk.attention));
    }

    V products[kNumProducts][kChunk];
    for (int i = 0; i < kChunk; ++i) {
      V product[kNumProducts] = {};
      C* const sample_row = samples + (first + i) * sample_size;
      if (chunk.at.inside[i]) {
        const C x = chunk.cell.x[i], y = chunk.cell.y[i];
        for (int source = 0; source < (kKeyAware && !kShared ? 2 : 1); ++source) {
          // The key comes second, where it is another tensor.
          const C* const base = source == 0 ? value : key;
          const int64_t stride = source == 0 ? value_stride : key_stride;
          const C* corner[4];
          for (int c = 0; c < 4; ++c) {
            corner[c] = chunk.cell.corner_inside[c][i] ? base + chunk.at.row[c][i] * stride : zeros;
          }
          for (int v = 0; v < row.vectors; ++v) {
            const V row0 = row.get(corner[0], v), row2 = row.get(corner[2], v);
            const V step0 = row.get(corner[1], v) - row0, step1 = row.get(corner[3], v) - row2;
            const V line0 = row0 + step0 * x, line1 = row2 + step1 * x;
            const V slope_y = line1 - line0;
            const V slope_x = step0 + (step1 - step0) * y;
            const V sample = line0 + slope_y * y;
            if (source == 0) {
              product[kGradValue] += grad[v] * sample;
              product[kGradSlopeX] += grad[v] * slope_x;
              product[kGradSlopeY] += grad[v] * slope_y;
            }
            if (kKeyAware && (kShared || source == 1)) {
              product[kQueryKey] += query[v] * sample;
              product[kQuerySlopeX] += query[v] * slope_x;
              product[kQuerySlopeY] += query[v] * slope_y;
              store(sample_row + v * kWidth, sample);
            }
          }
        }
      }
      for (int j = 0; j < (kKeyAware ? kNumProducts : kQueryKey); ++j) products[j][i] = product[j];
    }
    for (int j = 0; j < (kKeyAware ? kNumProducts : kQueryKey); ++j) {
      for (int i = 0; i < kChunk; i += kWidth) {
        store(chunk.product[j] + i, sum_each<C>(products[j] + i));
      }
    }
  }

  if (kKeyAware) {
    C peak = -C(INFINITY);
    for (int n = 0; n < num_chunks; ++n) {
      for (int i = 0; i < chunks[n].count; ++i) {
        const C product = chunks[n].product[kQueryKey][i];
        if (!(product <= peak)) peak = product;  // NaN as well
      }
    }
    V weight_sums = {}, weighted_sums = {};
    for (int n = 0; n < num_chunks; ++n) {
      BackwardChunk<C>& chunk = chunks[n];
      const C log2_scale = scale * C(1.4426950408889634);
      for (int i = chunk.count; i < kChunk; ++i) chunk.product[kQueryKey][i] = peak;
      for (int i = 0; i < kChunk; i += kWidth) {
        const V logit = load(chunk.product[kQueryKey] + i) - peak;
        store(chunk.attention + i, exp2(logit * log2_scale));
      }
      for (int i = chunk.count; i < kChunk; ++i) chunk.attention[i] = 0;
      for (int i = 0; i < kChunk; i += kWidth) {
        const V weight = load(chunk.attention + i);
        weight_sums += weight;
        weighted_sums += weight * load(chunk.product[kGradValue] + i);
      }
    }
    const C normaliser = 1 / sum<C>(weight_sums);
    const C mean = sum<C>(weighted_sums) * normaliser;
    for (int n = 0; n < num_chunks; ++n) {
      BackwardChunk<C>& chunk = chunks[n];
      for (int i = 0; i < kChunk; i += kWidth) {
        const V weight = load(chunk.attention + i) * normaliser;
        const V grad_logit = weight * (load(chunk.product[kGradValue] + i) - mean);
        store(chunk.attention + i, weight);
        store(chunk.grad_key + i, grad_logit * scale);
      }
    }
  }

  C* const grad_value = row_of<C>(p.grad_value, b, 0, m);
  C* const grad_key = kKeyAware && !kShared ? row_of<C>(p.grad_key, b, 0, m) : nullptr;
  C* const grad_locations = row_of<C>(p.grad_locations, b, q, m);
  V grad_query[R::kCapacity];
  for (int v = 0; v < row.vectors; ++v) grad_query[v] = V{};

  for (int n = 0; n < num_chunks; ++n) {
    const BackwardChunk<C>& chunk = chunks[n];
    const int first = n * kChunk;
    if (!kKeyAware) {
      C* const grad_weights = row_of<C>(p.grad_weights, b, q, m) + first;
      memcpy(grad_weights, chunk.product[kGradValue], chunk.count * sizeof(C));
    }
    for (int i = 0; i < chunk.count; ++i) {
      C along_x = chunk.attention[i] * chunk.product[kGradSlopeX][i];
      C along_y = chunk.attention[i] * chunk.product[kGradSlopeY][i];
      if (kKeyAware) {
        along_x += chunk.grad_key[i] * chunk.product[kQuerySlopeX][i];
        along_y += chunk.grad_key[i] * chunk.product[kQuerySlopeY][i];
      }
      const bool inside = chunk.at.inside[i];
      grad_locations[2 * (first + i)] = inside ? along_x * table.width[first + i] : 0;
      grad_locations[2 * (first + i) + 1] = inside ? along_y * table.height[first + i] : 0;
    }
    for (int i = 0; i < chunk.count; ++i) {
      if (!chunk.at.inside[i]) continue;
      const C attention = chunk.attention[i];
      const C key_factor = kKeyAware ? chunk.grad_key[i] : C(0);
      const C* const sample_row = samples + (first + i) * sample_size;
      V value_share[R::kCapacity], key_share[R::kCapacity];
      for (int v = 0; v < row.vectors; ++v) {
        value_share[v] = grad[v] * attention;
        if (kKeyAware) {
          grad_query[v] += load(sample_row + v * kWidth) * key_factor;
          if (kShared) {
            value_share[v] += query[v] * key_factor;
          } else {
            key_share[v] = query[v] * key_factor;
          }
        }
      }
      for (int c = 0; c < 4; ++c) {
        if (!chunk.cell.corner_inside[c][i]) continue;
        const C weight = chunk.at.weight[c][i];
        C* const to = grad_value + chunk.at.row[c][i] * p.grad_value.row_stride;
        for (int v = 0; v < row.vectors; ++v) {
          row.put(to, v, row.get(to, v) + value_share[v] * weight);
        }
        if (kKeyAware && !kShared) {
          C* const key_to = grad_key + chunk.at.row[c][i] * p.grad_key.row_stride;
          for (int v = 0; v < row.vectors; ++v) {
            row.put(key_to, v, row.get(key_to, v) + key_share[v] * weight);
          }
        }
      }
    }
  }
  if (kKeyAware) {
    C* const to = row_of<C>(p.grad_query, b, q, m);
    for (int v = 0; v < row.vectors; ++v) row.put(to, v, grad_query[v]);
  }
}

// All queries of one head: no other task writes to its slice of grad_value and grad_key, so sums
// are formed in the order of the queries whatever the number of threads.
template <class C, int kVectors>
void backward_slice(
    const Problem& p, const Table<C>& table, int64_t b, int64_t m, void* scratch) {
  BackwardChunk<C>* const chunks = static_cast<BackwardChunk<C>*>(scratch);
  const int64_t num_chunks = (p.levels * p.points + kChunk - 1) / kChunk;
  C* const samples = reinterpret_cast<C*>(chunks + num_chunks);
  for (int64_t q = 0; q < p.queries; ++q) {
    if (!p.query.data) {
      backward_head<C, kVectors, false, false>(p, table, b, q, m, chunks, samples);
    } else if (!p.key.data) {
      backward_head<C, kVectors, true, true>(p, table, b, q, m, chunks, samples);
    } else {
      backward_head<C, kVectors, true, false>(p, table, b, q, m, chunks, samples);
    }
  }
}

}  // namespace MMLITE_ISA

#endif
