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

#include <algorithm>

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

// The gradient of a sampled value, and that of the key as well where the value is its own key.
template <class C, int32_t kOp>
MMLITE_INLINE typename Simd<C>::V value_share(const typename Simd<C>::V& grad, C attention,
                                              const typename Simd<C>::V& query, C key_factor) {
  if constexpr (kOp == kKeyAwareShared) return grad * attention + query * key_factor;
  return grad * attention;
}

// The gradient of a point's pixel coordinate, as `backward_head` leaves it behind.
template <class C>
MMLITE_INLINE C pixel_grad(const BackwardChunk<C>* chunks, int64_t point, int axis) {
  return chunks[point / kChunk].product[kGradSlopeX + axis][point % kChunk];
}

// Written for all points, where each has a location, or an offset in pixels, of its own.
template <class C, class T>
MMLITE_INLINE void put_pixel_grads(
    const Problem& p, const Table<C>& table, const BackwardChunk<C>* chunks, T* to) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  const int num_numbers = static_cast<int>(2 * p.levels * p.points);
  for (int point = 0; 2 * point < num_numbers; point += kWidth) {
    const BackwardChunk<C>& chunk = chunks[point / kChunk];
    const int lane = point % kChunk;
    typename Simd<C>::I inside;
    memcpy(&inside, chunk.at.inside + lane, sizeof(inside));
    V x = load(chunk.product[kGradSlopeX] + lane), y = load(chunk.product[kGradSlopeY] + lane);
    if (p.sampling == kLocations) {
      x *= load(table.width + point);
      y *= load(table.height + point);
    }
    V both[2];
    interleave<C>(keep<C>(inside, x), keep<C>(inside, y), &both[0], &both[1]);
    for (int i = 0; i < 2; ++i) {
      const int first = 2 * point + i * kWidth, rest = num_numbers - first;
      if (rest >= kWidth) {
        store(to + first, both[i]);
      } else if (rest > 0) {
        store_head<C>(to + first, both[i], rest);
      }
    }
  }
}

// From there to what the points are said to be at: locations, or offsets and reference.
template <class C>
MMLITE_INLINE void put_place_grads(const Problem& p, const Table<C>& table, const Slice& slice,
                                   const GradSlice& grads, int64_t q,
                                   const BackwardChunk<C>* chunks) {
  const int64_t num_points = p.levels * p.points;
  const C half = C(0.5) / static_cast<C>(p.points);
  // What one of an offset counts in pixels.
  const auto unit = [&](int64_t point, int axis) {
    if (p.sampling == kFromPoints) return C(1);
    const C* const box = reference_of<C>(p, slice.batch, q, table.level[point]);
    return box[2 + axis] * half * table.size[2 * point + axis];
  };
  if (p.grads & kGradLocations) {
    with_type<C>(p.point_dtype, [&](auto* type) {
      auto* const to = row_of<std::remove_pointer_t<decltype(type)>>(
          p.grad_locations, slice.batch, q, slice.head);
      if (p.sampling != kFromBoxes && num_places(p) == num_points) {
        return put_pixel_grads(p, table, chunks, to);
      }
      const int64_t places = num_places(p);
      for (int64_t place = 0; place < places; ++place) {
        for (int axis = 0; axis < 2; ++axis) {
          C grad = 0;
          for (int64_t point = place; point < num_points; point += places) {
            // Zero outside of the map, whatever the unit.
            if (!chunks[point / kChunk].at.inside[point % kChunk]) continue;
            grad += pixel_grad(chunks, point, axis) * unit(point, axis);
          }
          narrow(grad, to + 2 * place + axis);
        }
      }
    });
  }
  if (!grads.reference) return;
  const int64_t count = reference_size(p), places = num_places(p);
  C* const to = static_cast<C*>(grads.reference) + q * p.levels * count;
  for (int64_t i = 0; i < p.levels * count; ++i) to[i] = 0;
  with_type<C>(p.point_dtype, [&](auto* type) {
    const auto* const offsets = row_of<const std::remove_pointer_t<decltype(type)>>(
        p.locations, slice.batch, q, slice.head);
    for (int64_t point = 0; point < num_points; ++point) {
      if (!chunks[point / kChunk].at.inside[point % kChunk]) continue;
      C* const of_level = to + table.level[point] * count;
      for (int axis = 0; axis < 2; ++axis) {
        const C grad = pixel_grad(chunks, point, axis) * table.size[2 * point + axis];
        of_level[axis] += grad;
        if (count == 4) of_level[2 + axis] += grad * half * widen(offsets[2 * (point % places) + axis]);
      }
    }
  });
}

// All gradients of one head of one query. `kSlopes`: those of the locations too, or of what they
// are made of.
template <class C, int kVectors, int32_t kOp, bool kSlopes>
MMLITE_INLINE void backward_head(
    const Problem& p, const Table<C>& table, const Slice& slice, const GradSlice& grads,
    const Coefficients& coefficients, int64_t q, C scale, BackwardChunk<C>* chunks, C* samples) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  constexpr bool kHasQuery = kOp != kStandard, kShared = kOp == kKeyAwareShared;
  constexpr bool kOwnKey = kOp == kKeyAware;
  typedef Row<C, kVectors> R;
  const R row(p.dim);
  const int num_points = static_cast<int>(p.levels * p.points);
  const int num_chunks = (num_points + kChunk - 1) / kChunk;
  const int64_t sample_size = padded_dim(p.dim);
  alignas(64) static const C zeros[kMaxDim] = {};

  const int64_t b = slice.batch, m = slice.head;
  const C* const value = static_cast<const C*>(slice.value);
  const C* const key = static_cast<const C*>(slice.key);
  const int64_t weight_offset =
      b * p.weights.batch_stride + q * p.weights.row_stride + m * p.weights.head_stride;

  V query[R::kCapacity], grad[R::kCapacity];
  get_row(p, p.grad_output, slice, q, row, 0, row.vectors, grad);
  C product_outside = 0;  // as in the forward pass
  if (kHasQuery) {
    get_row(p, p.query, slice, q, row, 0, row.vectors, query);
    product_outside = product_with_zeros<C>(query, row.vectors);
  }

  for (int n = 0; n < num_chunks; ++n) {
    BackwardChunk<C>& chunk = chunks[n];
    const int first = n * kChunk;
    chunk.count = num_points - first < kChunk ? num_points - first : kChunk;
    alignas(64) C buffer[kChunk];
    locate_points<C, true>(p, table, slice, q, first, chunk.count, &chunk.at, &chunk.cell);
    if (!kHasQuery) {
      const C* const weights = points_of<C>(p.weights.data, p.point_dtype, weight_offset + first,
                                            chunk.count, C(0), kChunk, buffer);
      memcpy(chunk.attention, weights, sizeof(chunk.attention));
    }
    // The gradient of the value alone needs no sample.
    if (!kHasQuery && !kSlopes && !(p.grads & kGradWeights)) continue;

    constexpr int kUsed = kHasQuery ? kNumProducts : kQueryKey;
    V fours[kUsed][kChunk / 4];
    for (int group = 0; group < kChunk; group += 4) {
      V parts[4][kUsed];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int i = group + j;
        V* const part = parts[j];
        for (int k = 0; k < kUsed; ++k) part[k] = V{};
        if (__builtin_expect(!chunk.at.inside[i], false)) continue;
        const C x = chunk.cell.x[i], y = chunk.cell.y[i];
        const C west = 1 - x, north = 1 - y;
        C* const sample_row = samples + (first + i) * sample_size;
        // The key comes second, where it is another tensor.
        for (int source = 0; source < (kOwnKey ? 2 : 1); ++source) {
          const C* const base = source == 0 ? value : key;
          const C* const row0 = chunk.cell.corner_inside[0][i] ? base + chunk.at.offset[0][i] : zeros;
          const C* const row1 = chunk.cell.corner_inside[1][i] ? base + chunk.at.offset[1][i] : zeros;
          const C* const row2 = chunk.cell.corner_inside[2][i] ? base + chunk.at.offset[2][i] : zeros;
          const C* const row3 = chunk.cell.corner_inside[3][i] ? base + chunk.at.offset[3][i] : zeros;
          for (int v = 0; v < row.vectors; ++v) {
            // Weighted sums rather than steps from corner to corner: one infinite feature makes
            // the sample infinite, not NaN.
            const V corner0 = row.get(row0, v), corner1 = row.get(row1, v);
            const V corner2 = row.get(row2, v), corner3 = row.get(row3, v);
            const V line0 = corner0 * west + corner1 * x, line1 = corner2 * west + corner3 * x;
            const V sample = line0 * north + line1 * y;
            V slope_x, slope_y;
            if (kSlopes) {
              slope_x = (corner1 - corner0) * north + (corner3 - corner2) * y;
              slope_y = line1 - line0;
            }
            if (source == 0) {
              part[kGradValue] += grad[v] * sample;
              if (kSlopes) {
                part[kGradSlopeX] += grad[v] * slope_x;
                part[kGradSlopeY] += grad[v] * slope_y;
              }
            }
            if (kHasQuery && (kShared || source == 1)) {
              part[kQueryKey] += query[v] * sample;
              if (kSlopes) {
                part[kQuerySlopeX] += query[v] * slope_x;
                part[kQuerySlopeY] += query[v] * slope_y;
              }
              store(sample_row + v * kWidth, sample);
            }
          }
        }
      }
      for (int k = 0; k < kUsed; ++k) {
        if (!kSlopes && k != kGradValue && k != kQueryKey) continue;
        fours[k][group / 4] = sum_four<C>(parts[0][k], parts[1][k], parts[2][k], parts[3][k]);
      }
    }
    for (int k = 0; k < kUsed; ++k) {
      if (!kSlopes && k != kGradValue && k != kQueryKey) continue;
      for (int i = 0; i < kChunk / kWidth; ++i) {
        V product = join_fours<C>(fours[k] + i * (kWidth / 4));
        if (k == kQueryKey) {
          typename Simd<C>::I inside;
          memcpy(&inside, chunk.at.inside + i * kWidth, sizeof(inside));
          product += keep<C>(~inside, broadcast<C>(product_outside));
        }
        store(chunk.product[k] + i * kWidth, product);
      }
    }
  }

  if (kHasQuery) {
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

  if (kSlopes) {
    for (int n = 0; n < num_chunks; ++n) {
      BackwardChunk<C>& chunk = chunks[n];
      for (int axis = 0; axis < 2; ++axis) {
        C* const along = chunk.product[kGradSlopeX + axis];
        for (int i = 0; i < kChunk; i += kWidth) {
          V grad_pixel = load(chunk.attention + i) * load(along + i);
          if (kHasQuery) {
            grad_pixel += load(chunk.grad_key + i) * load(chunk.product[kQuerySlopeX + axis] + i);
          }
          store(along + i, grad_pixel);
        }
      }
    }
    put_place_grads(p, table, slice, grads, q, chunks);
  }
  if (!kHasQuery && (p.grads & kGradWeights)) {
    with_type<C>(p.point_dtype, [&](auto* type) {
      auto* const to = row_of<std::remove_pointer_t<decltype(type)>>(p.grad_weights, b, q, m);
      for (int i = 0; i < num_points; ++i) {
        narrow(chunks[i / kChunk].product[kGradValue][i % kChunk], to + i);
      }
    });
  }
  C* const grad_value = static_cast<C*>(grads.value);
  C* const grad_key = static_cast<C*>(grads.key);
  const bool sums_rows = grad_value || grad_key, sums_query = kHasQuery && (p.grads & kGradQuery);
  V grad_query[R::kCapacity] = {}, share[R::kCapacity] = {}, key_share[R::kCapacity] = {};
  for (int n = 0; n < num_chunks && (sums_rows || sums_query); ++n) {
    const BackwardChunk<C>& chunk = chunks[n];
    for (int i = 0; i < chunk.count; ++i) {
      const C attention = chunk.attention[i];
      const C key_factor = kHasQuery ? chunk.grad_key[i] : C(0);
      if (__builtin_expect(!chunk.at.inside[i], false)) {
        // A sample of zeros, which NaN outlives.
        for (int v = 0; v < row.vectors; ++v) grad_query[v] += key_factor * C(0);
        continue;
      }
      if (sums_query) {
        const C* const sample = samples + (n * kChunk + i) * sample_size;
        for (int v = 0; v < row.vectors; ++v) grad_query[v] += load(sample + v * kWidth) * key_factor;
      }
      if (!sums_rows) continue;
      for (int v = 0; v < row.vectors; ++v) {
        share[v] = value_share<C, kOp>(grad[v], attention, query[v], key_factor);
        if (kOwnKey) key_share[v] = query[v] * key_factor;
      }
      for (int c = 0; c < 4; ++c) {
        if (!chunk.cell.corner_inside[c][i]) continue;
        const C weight = chunk.at.weight[c][i];
        if (!kOwnKey || grad_value) {
          C* const to = grad_value + chunk.at.offset[c][i];
          for (int v = 0; v < row.vectors; ++v) {
            row.put(to, v, row.get(to, v) + share[v] * weight);
          }
        }
        if (kOwnKey && grad_key) {
          C* const to = grad_key + chunk.at.offset[c][i];
          for (int v = 0; v < row.vectors; ++v) {
            row.put(to, v, row.get(to, v) + key_share[v] * weight);
          }
        }
      }
    }
  }
  if (sums_query) put_row(p, p.grad_query, slice, q, row, grad_query);
  if (!sums_rows && kHasQuery && coefficients.data) {
    C* const to = static_cast<C*>(coefficients.data) + q * Coefficients::per_query(p);
    for (int n = 0; n < num_chunks; ++n) {
      memcpy(to + n * kChunk, chunks[n].attention, chunks[n].count * sizeof(C));
      memcpy(to + num_points + n * kChunk, chunks[n].grad_key, chunks[n].count * sizeof(C));
    }
  }
}

template <class C, int kVectors, bool kSlopes>
void backward_rows(const Problem& p, const Table<C>& table, const Slice& slice,
                   const GradSlice& grads, const Coefficients& coefficients, int64_t q_begin,
                   int64_t q_end, void* scratch) {
  BackwardChunk<C>* const chunks = static_cast<BackwardChunk<C>*>(scratch);
  const int64_t num_points = p.levels * p.points;
  C* const samples = reinterpret_cast<C*>(chunks + (num_points + kChunk - 1) / kChunk);
  const C scale = C(1) / static_cast<C>(::sqrt(static_cast<double>(p.dim)));
  const int64_t size = bytes_of(p.dtype), point_size = bytes_of(p.point_dtype);
  for (int64_t q = q_begin; q < q_end; ++q) {
    const int64_t next = q + kAhead < q_end ? q + kAhead : q;
    prefetch_row(p.grad_output, slice, next, p.dim, size);
    prefetch_row(p.locations, slice, next, 2 * num_places(p), point_size);
    if (p.grads & kGradLocations) {
      prefetch_row(p.grad_locations, slice, next, 2 * num_places(p), point_size);
    }
    if (p.op == kStandard) {
      prefetch_row(p.weights, slice, next, num_points, point_size);
      if (p.grads & kGradWeights) {
        prefetch_row(p.grad_weights, slice, next, num_points, point_size);
      }
    } else {
      prefetch_row(p.query, slice, next, p.dim, size);
      if (p.grads & kGradQuery) prefetch_row(p.grad_query, slice, next, p.dim, size);
    }
    switch (p.op) {
      case kStandard:
        backward_head<C, kVectors, kStandard, kSlopes>(
            p, table, slice, grads, coefficients, q, scale, chunks, samples);
        break;
      case kKeyAware:
        backward_head<C, kVectors, kKeyAware, kSlopes>(
            p, table, slice, grads, coefficients, q, scale, chunks, samples);
        break;
      case kKeyAwareShared:
        backward_head<C, kVectors, kKeyAwareShared, kSlopes>(
            p, table, slice, grads, coefficients, q, scale, chunks, samples);
        break;
    }
  }
}

// One level's points of all queries of a head, in the order of the queries: row by row the same
// sums in the same order as `backward_head` forms them, for the channels of one block.
template <class C, int32_t kOp>
void scatter_share(const Problem& p, const Table<C>& table, const Slice& slice,
                   const Coefficients& coefficients, const Share& share, C* grads) {
  typedef typename Simd<C>::V V;
  constexpr int kWidth = Simd<C>::kWidth;
  const Row<C, 0> row(p.dim);
  const int v_begin = share.first_channel / kWidth;
  const int v_end = std::min(v_begin + kBlockDim / kWidth, row.vectors);
  const int points = static_cast<int>(p.points);
  const int64_t first_point = share.level * p.points, num_points = p.levels * p.points;
  const int64_t first_place = num_places(p) == num_points ? first_point : 0;
  V grad[kBlockDim / kWidth] = {}, query[kBlockDim / kWidth] = {};

  Chunk<C> at;
  Cell<C> cell;
  int64_t located = 0;  // the query and the point that the next chunk begins with
  int located_point = 0, lane = kChunk;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t next = q + kAhead < p.queries ? q + kAhead : q;
    prefetch_row(p.grad_output, slice, next, p.dim, bytes_of(p.dtype));
    if (kOp != kStandard) prefetch_row(p.query, slice, next, p.dim, bytes_of(p.dtype));
    if (kOp != kKeyAware || !share.of_key) {
      get_row(p, p.grad_output, slice, q, row, v_begin, v_end, grad);
    }
    if (kOp != kStandard) get_row(p, p.query, slice, q, row, v_begin, v_end, query);
    const C *attention = nullptr, *key_factor = nullptr;
    alignas(64) C buffer[2 * kChunk];
    if (kOp != kStandard) {
      attention = static_cast<const C*>(coefficients.data) + q * Coefficients::per_query(p) +
                  first_point;
      key_factor = attention + num_points;
    }
    for (int i = 0; i < points; ++i, ++lane) {
      if (lane == kChunk) {
        alignas(64) C xy[2 * kChunk];
        Origins<C> origins = {};
        for (int k = 0; k < kChunk; ++k) {
          if (located == p.queries) {
            xy[2 * k] = xy[2 * k + 1] = C(NAN);
            continue;
          }
          if (p.sampling != kLocations) {
            origins.set(p, k, reference_of<C>(p, slice.batch, located, share.level));
          }
          const int64_t offset = slice.batch * p.locations.batch_stride +
                                 located * p.locations.row_stride +
                                 slice.head * p.locations.head_stride +
                                 2 * (first_place + located_point);
          with_type<C>(p.point_dtype, [&](auto* type) {
            const auto* const from =
                static_cast<std::remove_pointer_t<decltype(type)>*>(p.locations.data) + offset;
            xy[2 * k] = widen(from[0]), xy[2 * k + 1] = widen(from[1]);
          });
          if (++located_point == points) located_point = 0, ++located;
        }
        if (p.sampling != kLocations) add_origins(p, origins, table, share.level * kChunk, xy);
        locate<C, true>(xy, table, share.level * kChunk, &at, &cell);
        lane = 0;
      }
      if (kOp == kStandard && i % kChunk == 0) {
        const int count = std::min(points - i, kChunk);
        const int64_t offset = slice.batch * p.weights.batch_stride + q * p.weights.row_stride +
                               slice.head * p.weights.head_stride + first_point + i;
        attention = points_of<C>(
            p.weights.data, p.point_dtype, offset, count, C(0), count, buffer);
      }
      if (!at.inside[lane]) continue;
      const C weight_of_point = attention[kOp == kStandard ? i % kChunk : i];
      V sum[kBlockDim / kWidth] = {};
      for (int v = 0; v < v_end - v_begin; ++v) {
        if (kOp == kKeyAware && share.of_key) {
          sum[v] = query[v] * key_factor[i];
        } else {
          sum[v] = value_share<C, kOp>(
              grad[v], weight_of_point, query[v], kOp == kStandard ? C(0) : key_factor[i]);
        }
      }
      for (int c = 0; c < 4; ++c) {
        if (!cell.corner_inside[c][lane]) continue;
        const C weight = at.weight[c][lane];
        C* const to = grads + at.offset[c][lane];
        for (int v = v_begin; v < v_end; ++v) {
          row.put(to, v, row.get(to, v) + sum[v - v_begin] * weight);
        }
      }
    }
  }
}

}  // namespace MMLITE_ISA

#endif
