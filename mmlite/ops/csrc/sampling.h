// From sampling locations to rows of the feature pyramid and their bilinear weights.
#ifndef MMLITE_SAMPLING_H
#define MMLITE_SAMPLING_H

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace MMLITE_ISA {

template <class C>
using Table = PointTable<C, typename Simd<C>::Int>;

// Where sixteen points fall. Corners are ordered (x0, y0), (x1, y0), (x0, y1), (x1, y1). A corner
// outside the map has the row of its neighbour inside. In the forward pass the two then share the
// neighbour's weight, so that each is a fair part of it (with a weight of zero an infinite feature
// would become NaN); in the backward pass, which skips such corners, it has weight zero. A point
// with no corner inside has `inside` zero and must not be read at all.
template <class C>
struct Chunk {
  typedef typename Simd<C>::Int Int;
  alignas(64) C weight[4][kChunk];
  alignas(64) Int offset[4][kChunk];  // of the corner's row in the slice, in elements
  alignas(64) Int inside[kChunk];
};

// What the backward pass needs besides.
template <class C>
struct Cell {
  alignas(64) C x[kChunk];  // position between the corners, in [0, 1)
  alignas(64) C y[kChunk];
  alignas(64) typename Simd<C>::Int corner_inside[4][kChunk];
};

// `xy` holds kChunk interleaved locations, `first` is the index of the first in the table.
template <class C, bool kWithCell = false>
MMLITE_INLINE void locate(
    const C* xy, const Table<C>& table, int64_t first, Chunk<C>* chunk, Cell<C>* cell = nullptr) {
  typedef typename Simd<C>::V V;
  typedef typename Simd<C>::I I;
  constexpr int kWidth = Simd<C>::kWidth;
  const C zero = 0, one = 1;
  const auto put = [](auto* to, auto lanes) { memcpy(to, &lanes, sizeof(lanes)); };
  for (int i = 0; i < kChunk; i += kWidth) {
    const V pair0 = load(xy + 2 * i), pair1 = load(xy + 2 * i + kWidth);
    const V width = load(table.width + first + i), height = load(table.height + first + i);
    V x = even<C>(pair0, pair1) * width - C(0.5);
    V y = odd<C>(pair0, pair1) * height - C(0.5);
    // False for NaN as well; what is left fits an integer.
    const I inside = (x >= -one) & (x < width) & (y >= -one) & (y < height);
    x = keep<C>(inside, x);
    y = keep<C>(inside, y);
    I x0 = __builtin_convertvector(x, I), y0 = __builtin_convertvector(y, I);
    x0 += x < __builtin_convertvector(x0, V);  // from truncation to floor: a true lane is -1
    y0 += y < __builtin_convertvector(y0, V);
    const V fx = x - __builtin_convertvector(x0, V), fy = y - __builtin_convertvector(y0, V);

    const I has_x0 = (x >= zero) & inside, has_x1 = (x < width - one) & inside;
    const I has_y0 = (y >= zero) & inside, has_y1 = (y < height - one) & inside;
    V wx0 = keep<C>(has_x0, one - fx), wx1 = keep<C>(has_x1, fx);
    V wy0 = keep<C>(has_y0, one - fy), wy1 = keep<C>(has_y1, fy);
    if (!kWithCell) {
      const V half_x = (wx0 + wx1) * C(0.5), half_y = (wy0 + wy1) * C(0.5);
      wx0 = choose<C>(has_x0 & has_x1, wx0, half_x), wx1 = choose<C>(has_x0 & has_x1, wx1, half_x);
      wy0 = choose<C>(has_y0 & has_y1, wy0, half_y), wy1 = choose<C>(has_y0 & has_y1, wy1, half_y);
    }
    put(chunk->weight[0] + i, wx0 * wy0);
    put(chunk->weight[1] + i, wx1 * wy0);
    put(chunk->weight[2] + i, wx0 * wy1);
    put(chunk->weight[3] + i, wx1 * wy1);

    // Corners are clamped into the map: where one of two is outside, both are the other one.
    I start, line;
    memcpy(&start, table.start + first + i, sizeof(I));
    memcpy(&line, table.line + first + i, sizeof(I));
    const I left = (x0 & has_x0) * table.stride, top = start + (y0 & has_y0) * line;
    const I right = left + (has_x0 & has_x1 & table.stride), bottom = top + (has_y0 & has_y1 & line);
    put(chunk->offset[0] + i, top + left);
    put(chunk->offset[1] + i, top + right);
    put(chunk->offset[2] + i, bottom + left);
    put(chunk->offset[3] + i, bottom + right);
    put(chunk->inside + i, inside);
    if (kWithCell) {
      put(cell->x + i, fx);
      put(cell->y + i, fy);
      put(cell->corner_inside[0] + i, has_x0 & has_y0);
      put(cell->corner_inside[1] + i, has_x1 & has_y0);
      put(cell->corner_inside[2] + i, has_x0 & has_y1);
      put(cell->corner_inside[3] + i, has_x1 & has_y1);
    }
  }
}

// `count` numbers of any dtype as compute type, the rest of `to` filled up.
template <class C, class T>
inline void widen_all(const T* from, int count, C fill, int size, C* to) {
  for (int i = 0; i < count; ++i) to[i] = widen(from[i]);
  for (int i = count; i < size; ++i) to[i] = fill;
}

// `size` numbers from `offset` on, of which `count` exist; copied to `buffer` only where the
// tensor does not hold them ready for use.
template <class C>
MMLITE_INLINE const C* points_of(
    const void* data, int32_t dtype, int64_t offset, int count, C fill, int size, C* buffer) {
  const bool same = dtype == (sizeof(C) == 8 ? kFloat64 : kFloat32);
  const C* ready = static_cast<const C*>(data) + offset;
  if (same && count == size) return ready;
  if (same) {
    widen_all(ready, count, fill, size, buffer);
  } else if (dtype == kBfloat16) {
    widen_all(static_cast<const bfloat16*>(data) + offset, count, fill, size, buffer);
  } else {
    widen_all(static_cast<const float16*>(data) + offset, count, fill, size, buffer);
  }
  return buffer;
}

template <class T>
MMLITE_INLINE T* row_of(const Rows& rows, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride +
         head * rows.head_stride;
}

// Calls `body` with a null pointer of the type that `dtype` stands for; the compute type is C.
template <class C, class Body>
MMLITE_INLINE void with_type(int32_t dtype, const Body& body) {
  if constexpr (sizeof(C) == 8) {
    body(static_cast<C*>(nullptr));
  } else if (dtype == kFloat32) {
    body(static_cast<float*>(nullptr));
  } else if (dtype == kBfloat16) {
    body(static_cast<bfloat16*>(nullptr));
  } else {
    body(static_cast<float16*>(nullptr));
  }
}

// Locations or offsets of one head of one query.
inline int64_t num_places(const Problem& p) {
  return (p.sampling == kLocations ? p.levels : p.offset_levels) * p.points;
}

template <class C>
MMLITE_INLINE const C* reference_of(const Problem& p, int64_t batch, int64_t q, int64_t level) {
  return row_of<const C>(p.reference, p.reference_batch == 1 ? 0 : batch, q, level);
}

// What the offsets of sixteen points start from, x and y in turn.
template <class C>
struct Origins {
  alignas(64) C centre[2 * kChunk];
  alignas(64) C extent[2 * kChunk];  // of boxes

  // `reference` is that of point i of the chunk.
  MMLITE_INLINE void set(const Problem& p, int i, const C* reference) {
    memcpy(centre + 2 * i, reference, 2 * sizeof(C));
    if (p.sampling == kFromBoxes) memcpy(extent + 2 * i, reference + 2, 2 * sizeof(C));
  }
};

// Where offsets lead to from reference points or boxes, on maps of the given size.
template <class C, class V = typename Simd<C>::V>
MMLITE_INLINE V moved(const Problem& p, V centre, V extent, V size, V offset) {
  if (p.sampling == kFromPoints) return centre + offset / size;
  const C half = C(0.5) / static_cast<C>(p.points);
  return centre + offset * (extent * half);
}

// Offsets become locations, in place.
template <class C>
MMLITE_INLINE void add_origins(const Problem& p, const Origins<C>& origins, const Table<C>& table,
                               int64_t first, C* xy) {
  for (int i = 0; i < 2 * kChunk; i += Simd<C>::kWidth) {
    store(xy + i, moved<C>(p, load(origins.centre + i), load(origins.extent + i),
                           load(table.size + 2 * first + i), load(xy + i)));
  }
}

// Interleaved (x, y) of one vector of points, that of each being at `pair(number)`; `same` says that
// this is one place for all of them.
template <class C, class Pair>
MMLITE_INLINE typename Simd<C>::V load_pairs(bool same, const Pair& pair) {
  constexpr int kPairs = Simd<C>::kWidth / 2;
  if constexpr (sizeof(C) == 4) {
    if (same) {
      int64_t both;
      memcpy(&both, pair(0), sizeof(both));
      return bit_cast<typename Simd<C>::V>(both - typename Simd<C>::Pairs{});
    }
    // Put together in registers: a vector that is loaded from numbers just stored has to wait.
    typename Simd<C>::Pairs pairs{};
#pragma GCC unroll 8
    for (int k = 0; k < kPairs; ++k) {
      int64_t both;
      memcpy(&both, pair(k), sizeof(both));
      pairs[k] = both;
    }
    return bit_cast<typename Simd<C>::V>(pairs);
  } else {
    C numbers[2 * kPairs];
    for (int k = 0; k < kPairs; ++k) memcpy(numbers + 2 * k, pair(k), 2 * sizeof(C));
    return load(numbers);
  }
}

// The locations of point `first` and the `count` - 1 behind it, from their offsets, whose type is T.
template <class C, class T>
MMLITE_INLINE void locations_from_offsets(
    const Problem& p, const Table<C>& table, const Slice& slice, int64_t q, int first, int count,
    C* xy) {
  typedef typename Simd<C>::V V;
  constexpr int kPairs = Simd<C>::kWidth / 2;
  const int places = static_cast<int>(num_places(p)), points = static_cast<int>(p.points);
  const bool shared = p.offset_levels != p.levels, same = points % kPairs == 0;
  const T* const offsets = row_of<const T>(p.locations, slice.batch, q, slice.head);
  const C* const reference = reference_of<C>(p, slice.batch, q, 0);
  const int64_t stride = p.reference.head_stride;
  for (int i = 0; i < kChunk; i += kPairs) {
    const int point = first + i, place = shared ? point % places : point;
    V offset;
    if (i + kPairs <= count && place + kPairs <= places) {
      offset = load(offsets + 2 * place);
    } else {
      C numbers[2 * kPairs];
      for (int k = 0; k < kPairs; ++k) {
        const T* const from = offsets + 2 * ((point + k) % places);
        numbers[2 * k] = i + k < count ? widen(from[0]) : C(NAN);
        numbers[2 * k + 1] = i + k < count ? widen(from[1]) : C(NAN);
      }
      offset = load(numbers);
    }
    const auto at = [&](int k) { return reference + table.level[point + k] * stride; };
    const V centre = load_pairs<C>(same, at);
    V extent{};
    if (p.sampling == kFromBoxes) extent = load_pairs<C>(same, [&](int k) { return at(k) + 2; });
    store(xy + 2 * i, moved<C>(p, centre, extent, load(table.size + 2 * point), offset));
  }
}

// Where point `first` and the `count` - 1 behind it of one head of one query fall; those that are
// left of the chunk are nowhere. A call of its own: inlined, it would take the registers in which the
// loops around it keep their sums.
template <class C, bool kWithCell = false>
__attribute__((noinline)) void locate_points(
    const Problem& p, const Table<C>& table, const Slice& slice, int64_t q, int first, int count,
    Chunk<C>* chunk, Cell<C>* cell = nullptr) {
  alignas(64) C buffer[2 * kChunk];
  const C* xy = buffer;
  if (p.sampling == kLocations) {
    const int64_t offset = slice.batch * p.locations.batch_stride + q * p.locations.row_stride +
                           slice.head * p.locations.head_stride + 2 * first;
    xy = points_of<C>(p.locations.data, p.point_dtype, offset, 2 * count, C(NAN), 2 * kChunk, buffer);
  } else {
    with_type<C>(p.point_dtype, [&](auto* type) {
      locations_from_offsets<C, std::remove_pointer_t<decltype(type)>>(
          p, table, slice, q, first, count, buffer);
    });
  }
  locate<C, kWithCell>(xy, table, first, chunk, cell);
}

// A row of D numbers as vectors in registers. kVectors fixes D at compile time to that many full
// vectors; with kVectors = 0 it is known at run time and the last vector may be partial.
template <class C, int kVectors>
struct Row {
  typedef typename Simd<C>::V V;
  static constexpr int kWidth = Simd<C>::kWidth;
  static constexpr int kCapacity = kVectors ? kVectors : kMaxDim / kWidth;
  int full;     // whole vectors
  int rest;     // numbers in the last, partial vector
  int vectors;  // all of them

  MMLITE_INLINE explicit Row(int64_t dim)
      : full(kVectors ? kVectors : static_cast<int>(dim) / kWidth),
        rest(kVectors ? 0 : static_cast<int>(dim) % kWidth),
        vectors(full + (rest != 0)) {}

  template <class T>
  MMLITE_INLINE V get(const T* from, int v) const {
    return kVectors || v < full ? load(from + v * kWidth) : load_head<C>(from + v * kWidth, rest);
  }

  template <class T>
  MMLITE_INLINE void put(T* to, int v, V x) const {
    if (kVectors || v < full) {
      store(to + v * kWidth, x);
    } else {
      store_head<C>(to + v * kWidth, x, rest);
    }
  }
};

// Vectors `begin` up to `end` of a row of the problem's dtype.
template <class C, int kVectors>
MMLITE_INLINE void get_row(const Problem& p, const Rows& rows, const Slice& slice, int64_t q,
                           const Row<C, kVectors>& row, int begin, int end,
                           typename Simd<C>::V* to) {
  with_type<C>(p.dtype, [&](auto* type) {
    const auto* const from = row_of<std::remove_pointer_t<decltype(type)>>(
        rows, slice.batch, q, slice.head);
    for (int v = begin; v < end; ++v) to[v - begin] = row.get(from, v);
  });
}

// Writes a whole row, rounded to the problem's dtype.
template <class C, int kVectors>
MMLITE_INLINE void put_row(const Problem& p, const Rows& rows, const Slice& slice, int64_t q,
                           const Row<C, kVectors>& row, const typename Simd<C>::V* from) {
  with_type<C>(p.dtype, [&](auto* type) {
    auto* const to = row_of<std::remove_pointer_t<decltype(type)>>(
        rows, slice.batch, q, slice.head);
    for (int v = 0; v < row.vectors; ++v) row.put(to, v, from[v]);
  });
}

// The product of a row with a sample of zeros: zero, or NaN where the row has something infinite.
template <class C>
MMLITE_INLINE C product_with_zeros(const typename Simd<C>::V* row, int vectors) {
  typename Simd<C>::V product = {};
  for (int v = 0; v < vectors; ++v) product += row[v] * C(0);
  return any<C>(product != product) ? C(NAN) : C(0);
}

inline int64_t bytes_of(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// Asks for what query `q` will read or write of a tensor, `count` elements of the given size. The
// rows of one head lie too far apart for the hardware to see them coming.
MMLITE_INLINE void prefetch_row(const Rows& rows, const Slice& slice, int64_t q, int64_t count,
                                int64_t element_size) {
  if (!rows.data) return;
  const int64_t offset =
      slice.batch * rows.batch_stride + q * rows.row_stride + slice.head * rows.head_stride;
  const char* const begin = static_cast<const char*>(rows.data) + offset * element_size;
  for (int64_t byte = 0; byte < count * element_size; byte += 64) __builtin_prefetch(begin + byte);
}

// How many queries ahead that is done.
constexpr int64_t kAhead = 4;

}  // namespace MMLITE_ISA

#endif
