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
MMLITE_INLINE void backward_head(
    const Problem& p, const Table<C>& table, const Slice& slice, const GradSlice& grads, int64_t q,
    C scale, BackwardChunk<C>* chunks, C* samples) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);
  const int num_chunks = (num_points + kChunk - 1) / kChunk;
  const int64_t sample_size = padded_dim(p.dim);
  alignas(64) static const C zeros[kMaxDim] = {};

  const int64_t b = slice.batch, m = slice.head;
  const C* const value = static_cast<const C*>(slice.value);
  const C* const key = static_cast<const C*>(slice.key);
  const int64_t location =
      b * p.locations.batch_stride + q * p.locations.row_stride + m * p.locations.head_stride;
  const int64_t weight_offset =
      b * p.weights.batch_stride + q * p.weights.row_stride + m * p.weights.head_stride;

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

    constexpr int kUsed = kKeyAware ? kNumProducts : kQueryKey;
    V fours[kUsed][kChunk / 4];
    for (int group = 0; group < kChunk; group += 4) {
      V parts[4][kUsed];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int i = group + j;
        V* const part = parts[j];
        for (int k = 0; k < kUsed; ++k) part[k] = V{};
        if (!chunk.at.inside[i]) continue;
        const C x = chunk.cell.x[i], y = chunk.cell.y[i];
        C* const sample_row = samples + (first + i) * sample_size;
        // The key comes second, where it is another tensor.
        for (int source = 0; source < (kKeyAware && !kShared ? 2 : 1); ++source) {
          const C* const base = source == 0 ? value : key;
          const C* const row0 = chunk.cell.corner_inside[0][i] ? base + chunk.at.offset[0][i] : zeros;
          const C* const row1 = chunk.cell.corner_inside[1][i] ? base + chunk.at.offset[1][i] : zeros;
          const C* const row2 = chunk.cell.corner_inside[2][i] ? base + chunk.at.offset[2][i] : zeros;
          const C* const row3 = chunk.cell.corner_inside[3][i] ? base + chunk.at.offset[3][i] : zeros;
          for (int v = 0; v < row.vectors; ++v) {
            const V corner0 = row.get(row0, v), corner2 = row.get(row2, v);
            const V step0 = row.get(row1, v) - corner0, step1 = row.get(row3, v) - corner2;
            const V line0 = corner0 + step0 * x, line1 = corner2 + step1 * x;
            const V slope_x = step0 + (step1 - step0) * y, slope_y = line1 - line0;
            const V sample = line0 + slope_y * y;
            if (source == 0) {
              part[kGradValue] += grad[v] * sample;
              part[kGradSlopeX] += grad[v] * slope_x;
              part[kGradSlopeY] += grad[v] * slope_y;
            }
            if (kKeyAware && (kShared || source == 1)) {
              part[kQueryKey] += query[v] * sample;
              part[kQuerySlopeX] += query[v] * slope_x;
              part[kQuerySlopeY] += query[v] * slope_y;
              store(sample_row + v * kWidth, sample);
            }
          }
        }
      }
      for (int k = 0; k < kUsed; ++k) {
        fours[k][group / 4] = sum_four<C>(parts[0][k], parts[1][k], parts[2][k], parts[3][k]);
      }
    }
    for (int k = 0; k < kUsed; ++k) {
      for (int i = 0; i < kChunk / kWidth; ++i) {
        store(chunk.product[k] + i * kWidth, join_fours<C>(fours[k] + i * (kWidth / 4)));
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

  C* const grad_value = static_cast<C*>(grads.value);
  C* const grad_key = static_cast<C*>(grads.key);
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
        C* const to = grad_value + chunk.at.offset[c][i];
        for (int v = 0; v < row.vectors; ++v) {
          row.put(to, v, row.get(to, v) + value_share[v] * weight);
        }
        if (kKeyAware && !kShared) {
          C* const key_to = grad_key + chunk.at.offset[c][i];
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

// All queries of one head, in their order: no other task adds to its gradients.
template <class C, int kVectors>
void backward_slice(const Problem& p, const Table<C>& table, const Slice& slice,
                    const GradSlice& grads, void* scratch) {
  BackwardChunk<C>* const chunks = static_cast<BackwardChunk<C>*>(scratch);
  const int64_t num_chunks = (p.levels * p.points + kChunk - 1) / kChunk;
  C* const samples = reinterpret_cast<C*>(chunks + num_chunks);
  const C scale = C(1) / static_cast<C>(::sqrt(static_cast<double>(p.dim)));
  const int64_t num_points = p.levels * p.points;
  const int64_t point_size = p.point_dtype == kFloat64 ? 8 : p.point_dtype == kFloat32 ? 4 : 2;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t next = q + kAhead < p.queries ? q + kAhead : q;
    prefetch_row(p.query, slice, next, p.dim, sizeof(C));
    prefetch_row(p.grad_output, slice, next, p.dim, sizeof(C));
    prefetch_row(p.grad_query, slice, next, p.dim, sizeof(C));
    prefetch_row(p.locations, slice, next, 2 * num_points, point_size);
    prefetch_row(p.weights, slice, next, num_points, point_size);
    prefetch_row(p.grad_locations, slice, next, 2 * num_points, sizeof(C));
    prefetch_row(p.grad_weights, slice, next, num_points, sizeof(C));
    if (!p.query.data) {
      backward_head<C, kVectors, false, false>(
          p, table, slice, grads, q, scale, chunks, samples);
    } else if (!p.key.data) {
      backward_head<C, kVectors, true, true>(p, table, slice, grads, q, scale, chunks, samples);
    } else {
      backward_head<C, kVectors, true, false>(p, table, slice, grads, q, scale, chunks, samples);
    }
  }
}

}  // namespace MMLITE_ISA

#endif
