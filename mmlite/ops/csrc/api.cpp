// The functions Python calls: checks what memory safety rests on, chooses the kernels and
// shares the tasks out.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

#if defined(_WIN32)
#define MMLITE_API extern "C" __declspec(dllexport)
#else
#define MMLITE_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Tokens that one task copies, and queries that one task takes at the least.
constexpr int64_t kTokensPerTask = 1024;
constexpr int64_t kQueriesPerTask = 64;

const Kernels& kernels_of(const Problem& p) {
#if defined(MMLITE_X86)
  if (p.dtype != kFloat64) {
    if (p.isa == kAvx512) return kAvx512Kernels;
    if (p.isa == kAvx2) return kAvx2Kernels;
  }
#endif
  return kBaselineKernels;
}

bool has_key(const Problem& p) { return p.op == kKeyAware; }

// ---------------------------------------------------------------- what a caller may not hand over

bool in_range(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

// Whether the problem is one at all, but for the level sizes.
bool is_problem(const Problem& p, bool is_backward) {
  const bool is_standard = p.op == kStandard;
  if (!in_range(p.op, kStandard, kKeyAwareShared) || !in_range(p.dtype, kFloat32, kFloat64) ||
      !in_range(p.point_dtype, kFloat32, kFloat64) || !in_range(p.isa, kBaseline, best_isa()) ||
      p.threads < 1 || (p.dtype == kFloat64) != (p.point_dtype == kFloat64) ||
      (p.point_dtype != kFloat32 && p.point_dtype != p.dtype)) {
    return false;
  }
  if (p.batch < 0 || p.queries < 0 || p.tokens < 0 || p.heads < 1 || p.levels < 1 ||
      p.points < 1 || !in_range(p.dim, 1, kMaxDim) || !p.spatial_shapes ||
      p.levels > INT32_MAX / (4 * kChunk) / p.points) {
    return false;
  }
  const bool has_offsets = p.sampling != kLocations;
  const auto one_or = [](int64_t all, int64_t count) { return count == 1 || count == all; };
  if (!in_range(p.sampling, kLocations, kFromBoxes) ||
      (has_offsets && (!one_or(p.batch, p.reference_batch) || !one_or(p.levels, p.offset_levels)))) {
    return false;
  }
  const bool is_empty = p.batch == 0 || p.queries == 0;
  const auto there = [&](const Rows& rows) { return is_empty || rows.data; };
  if (!there(p.value) || !there(p.locations) || (is_standard && !there(p.weights)) ||
      (!is_standard && !there(p.query)) || (has_key(p) && !there(p.key)) ||
      (has_offsets && !there(p.reference))) {
    return false;
  }
  if (!is_backward) return there(p.output);
  const int32_t possible = kGradValue | kGradLocations | (is_standard ? kGradWeights : kGradQuery) |
                           (has_key(p) ? kGradKey : 0) | (has_offsets ? kGradReference : 0);
  // An empty problem leaves gradients of zero for the features.
  const auto asked = [&](int32_t grad, const Rows& rows, bool needed) {
    return !(p.grads & grad) || !needed || rows.data;
  };
  return there(p.grad_output) && !(p.grads & ~possible) &&
         asked(kGradValue, p.grad_value, p.batch > 0) &&
         asked(kGradKey, p.grad_key, p.batch > 0) && asked(kGradQuery, p.grad_query, !is_empty) &&
         asked(kGradLocations, p.grad_locations, !is_empty) &&
         asked(kGradWeights, p.grad_weights, !is_empty) &&
         asked(kGradReference, p.grad_reference, p.reference_batch > 0 && p.queries > 0);
}

bool shapes_fit(const Problem& p) {
  int64_t tokens = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
    if (height < 1 || width < 1 || height > p.tokens || width > p.tokens / height) return false;
    tokens += height * width;
  }
  return tokens == p.tokens;
}

// ---------------------------------------------------------------- memory

// A PointTable and the memory it lives in. With `by_level` it has kChunk points of each level
// instead of the problem's own.
template <class C, class Int>
class OwnedTable {
 public:
  OwnedTable(const Problem& p, int64_t stride, bool by_level = false) {
    const int64_t points = by_level ? kChunk : p.points, num_points = p.levels * points;
    const int64_t padded = (num_points + kChunk - 1) / kChunk * kChunk;
    numbers_.reset(new C[4 * padded]);
    integers_.reset(new Int[3 * padded]);
    C* const numbers = numbers_.get();
    Int* const integers = integers_.get();
    table = {numbers,           numbers + padded,      numbers + 2 * padded,    integers,
             integers + padded, integers + 2 * padded, static_cast<Int>(stride)};
    int64_t start = 0;
    for (int64_t level = 0, i = 0; level < p.levels; ++level) {
      const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
      for (int64_t point = 0; point < points; ++point, ++i) {
        set(i, level, height, width, start * stride, width * stride);
      }
      start += height * width;
    }
    for (int64_t i = num_points; i < padded; ++i) set(i, 0, 1, 1, 0, 0);
  }

  PointTable<C, Int> table;

 private:
  void set(int64_t i, int64_t level, int64_t height, int64_t width, int64_t start, int64_t line) {
    table.width[i] = table.size[2 * i] = static_cast<C>(width);
    table.height[i] = table.size[2 * i + 1] = static_cast<C>(height);
    table.level[i] = static_cast<Int>(level);
    table.start[i] = static_cast<Int>(start);
    table.line[i] = static_cast<Int>(line);
  }

  std::unique_ptr<C[]> numbers_;
  std::unique_ptr<Int[]> integers_;
};

constexpr int64_t kLine = 64;

int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Memory that begins with a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : owned_(new char[bytes + kLine]),
        data(owned_.get() + (-reinterpret_cast<uintptr_t>(owned_.get()) & (kLine - 1))) {}

 private:
  std::unique_ptr<char[]> owned_;

 public:
  char* const data;
};

int64_t compute_size(const Problem& p) { return p.dtype == kFloat64 ? 8 : 4; }
int32_t compute_dtype(const Problem& p) { return p.dtype == kFloat64 ? kFloat64 : kFloat32; }

// A copy of the rows of one head in the compute type, token after token; a key of its own lies
// behind its value. The gradients of a head have the same layout.
struct PackedLayout {
  explicit PackedLayout(const Problem& problem, const Kernels& its_kernels)
      : p(problem),
        kernels(its_kernels),
        stride(has_key(p) ? 2 * p.dim : p.dim),
        row_bytes(stride * compute_size(p)),
        key_offset(has_key(p) ? p.dim * compute_size(p) : 0),
        bytes(whole_lines(p.tokens * row_bytes)) {}

  void pack(const Slice& from, int64_t begin, int64_t end, char* to) const {
    kernels.pack(p, p.value, from.batch, from.head, begin, end, to, stride);
    if (!has_key(p)) return;
    kernels.pack(p, p.key, from.batch, from.head, begin, end, to + key_offset, stride);
  }

  Slice slice(const Slice& original, const char* packed) const {
    return {original.batch, original.head, packed + key_offset, packed, compute_dtype(p)};
  }

  GradSlice grads(char* packed) const {
    return {p.grads & kGradKey ? packed + key_offset : nullptr,
            p.grads & kGradValue ? packed : nullptr, nullptr};
  }

  void unpack(const Slice& slice, const char* from) const {
    const int32_t dim = static_cast<int32_t>(p.dim);
    if (p.grads & kGradValue) {
      kernels.unpack(
          p, p.grad_value, slice.batch, slice.head, 0, p.tokens, from, stride, 0, dim);
    }
    if (p.grads & kGradKey) {
      kernels.unpack(p, p.grad_key, slice.batch, slice.head, 0, p.tokens, from + key_offset,
                     stride, 0, dim);
    }
  }

  const Problem& p;
  const Kernels& kernels;
  const int64_t stride;  // of the tokens, in elements
  const int64_t row_bytes;
  const int64_t key_offset;  // in bytes, zero where the value is its own key
  const int64_t bytes;
};

// ---------------------------------------------------------------- tasks

// Calls task(i, slot) for every i below num_tasks, whichever thread is free taking the next; the
// slot is the thread's own number below p.threads.
template <class Task>
void for_each_task(const Problem& p, int64_t num_tasks, const Task& task) {
  std::atomic<int64_t> next_task{0}, next_slot{0};
  run_team(static_cast<int>(std::min<int64_t>(num_tasks, p.threads)), [&] {
    const int64_t slot = next_slot++;
    for (int64_t i; (i = next_task++) < num_tasks;) task(i, slot);
  });
}

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

const void* first_row(const Problem& p, const Rows& rows, int64_t batch, int64_t head) {
  const int64_t size = p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2;
  return static_cast<const char*>(rows.data) +
         (batch * rows.batch_stride + head * rows.head_stride) * size;
}

Slice slice_of(const Problem& p, int64_t i) {
  const int64_t b = i / p.heads, m = i % p.heads;
  return {b, m, first_row(p, has_key(p) ? p.key : p.value, b, m), first_row(p, p.value, b, m),
          p.dtype};
}

// Queries are taken block by block: task(slice number, first query, last query, slot). Threads
// that keep step stay each with one head, and go through its queries in order.
template <class Task>
void for_each_block(const Problem& p, int64_t slices, const Task& task) {
  const int64_t wanted = std::max<int64_t>(8, 4 * p.threads / slices);
  const int64_t size = std::max(kQueriesPerTask, blocks_of(p.queries, wanted));
  for_each_task(p, slices * blocks_of(p.queries, size), [&](int64_t i, int64_t slot) {
    const int64_t begin = i / slices * size;
    task(i % slices, begin, std::min(begin + size, p.queries), slot);
  });
}

void pack_group(const Problem& p, const PackedLayout& layout, int64_t first, int64_t slices,
                char* to) {
  for_each_task(p, slices * blocks_of(p.tokens, kTokensPerTask), [&](int64_t task, int64_t) {
    const int64_t i = task % slices, begin = task / slices * kTokensPerTask;
    layout.pack(slice_of(p, first + i), begin, std::min(begin + kTokensPerTask, p.tokens),
                to + i * layout.bytes);
  });
}

// Whether copying the rows of a head together pays. In (B, S, M, D) the rows of one head lie M*D
// elements apart, which leaves them an M-th of every cache's sets and pages of the TLB; a copy
// costs about as much as sampling each row a few times from the cache saves.
bool worth_packing(const Problem& p) {
  return p.queries * p.levels * p.points >= 3 * p.tokens &&
         (p.value.row_stride != p.dim || p.dtype != compute_dtype(p));
}

// Whether the kernels can step through the tensors as they are.
bool addressable(const Problem& p) {
  return p.value.row_stride >= 0 && p.tokens * p.value.row_stride <= INT32_MAX &&
         (!has_key(p) || p.key.row_stride == p.value.row_stride);
}

// Calls body(points, levels) with the tables for rows `stride` elements apart; returns a Status.
template <class Body>
int32_t with_tables(const Problem& p, int64_t stride, const Body& body) {
  if (p.dtype != kFloat64 && p.tokens > INT32_MAX / std::max<int64_t>(stride, 1)) return kTooLarge;
  try {
    if (p.dtype == kFloat64) {
      const OwnedTable<double, int64_t> points(p, stride), levels(p, stride, true);
      body(&points.table, &levels.table);
    } else {
      const OwnedTable<float, int32_t> points(p, stride), levels(p, stride, true);
      body(&points.table, &levels.table);
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// ---------------------------------------------------------------- the gradient of the reference

// All heads of a query have the same reference, and all images may have. Each head leaves its part
// here, and the parts are added up in the end, always in the same order.
class ReferenceGrads {
 public:
  explicit ReferenceGrads(const Problem& problem)
      : p(problem),
        row_(p.levels * reference_size(p)),
        parts_(p.grads & kGradReference
                   ? p.batch * p.heads * p.queries * row_ * compute_size(p)
                   : 0) {}

  // Where the head's part goes.
  void* part(int64_t slice) const {
    if (!(p.grads & kGradReference)) return nullptr;
    return parts_.data + slice * p.queries * row_ * compute_size(p);
  }

  void add_up() const {
    if (!(p.grads & kGradReference)) return;
    if (p.dtype == kFloat64) {
      add_up<double>();
    } else {
      add_up<float>();
    }
  }

 private:
  template <class C>
  void add_up() const {
    const int64_t images = p.batch / std::max<int64_t>(p.reference_batch, 1);
    const int64_t blocks = blocks_of(p.queries, kQueriesPerTask);
    for_each_task(p, p.reference_batch * blocks, [&](int64_t task, int64_t) {
      const int64_t batch = task / blocks, begin = task % blocks * kQueriesPerTask;
      for (int64_t q = begin; q < std::min(begin + kQueriesPerTask, p.queries); ++q) {
        for (int64_t i = 0; i < row_; ++i) {
          C sum = 0;
          for (int64_t slice = 0; slice < images * p.heads; ++slice) {
            sum += static_cast<const C*>(part(batch * images * p.heads + slice))[q * row_ + i];
          }
          static_cast<C*>(p.grad_reference.data)[batch * p.grad_reference.batch_stride +
                                                 q * p.grad_reference.row_stride +
                                                 i / reference_size(p) *
                                                     p.grad_reference.head_stride +
                                                 i % reference_size(p)] = sum;
        }
      }
    });
  }

  const Problem& p;
  const int64_t row_;
  const Scratch parts_;
};

// ---------------------------------------------------------------- the passes

void forward(const Problem& p, const Kernels& kernels, const PackedLayout& layout, bool packs,
             const void* table) {
  const int64_t num_slices = p.batch * p.heads;
  // As many heads at a time as there are threads: the scratch grows with the threads alone.
  const int64_t group = std::min<int64_t>(num_slices, p.threads);
  const Scratch scratch(packs ? group * layout.bytes : 0);
  for (int64_t first = 0; first < num_slices; first += group) {
    const int64_t slices = std::min(group, num_slices - first);
    if (packs) pack_group(p, layout, first, slices, scratch.data);
    for_each_block(p, slices, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
      Slice slice = slice_of(p, first + i);
      if (packs) slice = layout.slice(slice, scratch.data + i * layout.bytes);
      kernels.forward(p, table, slice, begin, end);
    });
  }
}

// One task a head: it works on copies of its rows, sums their gradients in the order of the
// queries, and writes them out in the end.
void backward_by_heads(const Problem& p, const Kernels& kernels, const PackedLayout& layout,
                       const ReferenceGrads& reference, const void* table) {
  const int64_t num_slices = p.batch * p.heads;
  const int64_t kernel_bytes = whole_lines(kernels.backward_scratch_bytes(p));
  const int64_t slot_bytes = kernel_bytes + 2 * layout.bytes;
  const Scratch scratch(std::min<int64_t>(num_slices, p.threads) * slot_bytes);
  for_each_task(p, num_slices, [&](int64_t i, int64_t slot) {
    char* const kernel_scratch = scratch.data + slot * slot_bytes;
    char* const rows = kernel_scratch + kernel_bytes;
    char* const grads = rows + layout.bytes;
    const Slice slice = slice_of(p, i);
    layout.pack(slice, 0, p.tokens, rows);
    memset(grads, 0, layout.bytes);
    GradSlice grad_slice = layout.grads(grads);
    grad_slice.reference = reference.part(i);
    kernels.backward(p, table, layout.slice(slice, rows), grad_slice, {nullptr}, 0, p.queries,
                     kernel_scratch);
    layout.unpack(slice, grads);
  });
}

// Many tasks a head, in two halves: blocks of queries, which leave the coefficients of their points
// behind; then, level by level and for a few channels each, the sums of the gradients of key and
// value. A row's summands come in the order of the queries here too, so that the sums have the same
// bits. The gradients take the place of the rows, which the second half no longer needs.
void backward_by_blocks(const Problem& p, const Kernels& kernels, const PackedLayout& layout,
                        const ReferenceGrads& reference, const void* points, const void* levels) {
  const int64_t num_slices = p.batch * p.heads;
  const int64_t group = std::min<int64_t>(num_slices, p.threads);
  const bool sums = p.grads & (kGradValue | kGradKey);
  const int64_t coefficient_bytes =
      sums && p.op != kStandard
          ? whole_lines(p.queries * Coefficients::per_query(p) * compute_size(p))
          : 0;
  const int64_t slice_bytes = layout.bytes + coefficient_bytes;
  const int64_t kernel_bytes = whole_lines(kernels.backward_scratch_bytes(p));
  const Scratch scratch(group * slice_bytes + p.threads * kernel_bytes);
  char* const kernel_scratch = scratch.data + group * slice_bytes;
  char* const all_coefficients = scratch.data + group * layout.bytes;

  const int64_t channel_blocks = blocks_of(p.dim, kBlockDim);
  const int64_t sources = (p.grads & kGradValue ? 1 : 0) + (p.grads & kGradKey ? 1 : 0);
  for (int64_t first = 0; first < num_slices; first += group) {
    const int64_t slices = std::min(group, num_slices - first);
    const auto coefficients_of = [&](int64_t i) -> Coefficients {
      return {coefficient_bytes ? all_coefficients + i * coefficient_bytes : nullptr};
    };
    pack_group(p, layout, first, slices, scratch.data);
    for_each_block(p, slices, [&](int64_t i, int64_t begin, int64_t end, int64_t slot) {
      const Slice slice = layout.slice(slice_of(p, first + i), scratch.data + i * layout.bytes);
      kernels.backward(p, points, slice, {nullptr, nullptr, reference.part(first + i)},
                       coefficients_of(i), begin, end, kernel_scratch + slot * kernel_bytes);
    });

    for_each_task(p, slices * p.levels * channel_blocks * sources, [&](int64_t task, int64_t) {
      const int64_t i = task % slices, level = task / slices % p.levels;
      const int64_t rest = task / slices / p.levels;
      const bool of_key = rest / channel_blocks == 1 || !(p.grads & kGradValue);
      const int32_t channel = static_cast<int32_t>(rest % channel_blocks * kBlockDim);
      const int32_t channels =
          static_cast<int32_t>(std::min<int64_t>(kBlockDim, p.dim - channel));
      int64_t start = 0, end = 0;
      for (int64_t l = 0; l <= level; ++l) {
        start = end;
        end += p.spatial_shapes[2 * l] * p.spatial_shapes[2 * l + 1];
      }
      char* const grads = scratch.data + i * layout.bytes + (of_key ? layout.key_offset : 0);
      char* const block = grads + channel * compute_size(p);
      for (int64_t token = start; token < end; ++token) {
        memset(block + token * layout.row_bytes, 0, channels * compute_size(p));
      }
      const Slice slice = slice_of(p, first + i);
      kernels.scatter(p, levels, slice, coefficients_of(i), {level, channel, of_key}, grads);
      kernels.unpack(p, of_key ? p.grad_key : p.grad_value, slice.batch, slice.head, start, end,
                     block, layout.stride, channel, channels);
    });
  }
}

// Whether heads alone would leave threads idle for long, or nothing needs one task a head.
bool needs_blocks(const Problem& p) {
  if (!(p.grads & (kGradValue | kGradKey))) return true;
  const int64_t slices = p.batch * p.heads;
  return 4 * slices < 3 * blocks_of(slices, p.threads) * p.threads;
}

}  // namespace

// The best instruction set of this machine, an Isa.
MMLITE_API int32_t mmlite_best_isa() { return best_isa(); }

MMLITE_API void mmlite_set_openmp(void* gomp_parallel) {
  set_gomp_parallel(reinterpret_cast<GompParallel>(gomp_parallel));
}

MMLITE_API int32_t mmlite_interface() { return kInterface; }

// Both return a Status.
MMLITE_API int32_t mmlite_forward(const Problem* problem) {
  if (!problem || !is_problem(*problem, false)) return kBadProblem;
  const Problem& p = *problem;
  if (!shapes_fit(p)) return kBadShapes;
  if (p.batch == 0 || p.queries == 0) return kOk;
  const Kernels& kernels = kernels_of(p);
  const PackedLayout layout(p, kernels);
  const bool packs = worth_packing(p) || !addressable(p);
  return with_tables(p, packs ? layout.stride : p.value.row_stride,
                     [&](const void* points, const void*) {
                       forward(p, kernels, layout, packs, points);
                     });
}

MMLITE_API int32_t mmlite_backward(const Problem* problem) {
  if (!problem || !is_problem(*problem, true)) return kBadProblem;
  const Problem& p = *problem;
  if (!shapes_fit(p)) return kBadShapes;
  if (p.batch == 0) {
    ReferenceGrads(p).add_up();
    return kOk;
  }
  const Kernels& kernels = kernels_of(p);
  const PackedLayout layout(p, kernels);
  return with_tables(p, layout.stride, [&](const void* points, const void* levels) {
    const ReferenceGrads reference(p);
    if (needs_blocks(p)) {
      backward_by_blocks(p, kernels, layout, reference, points, levels);
    } else {
      backward_by_heads(p, kernels, layout, reference, points);
    }
    reference.add_up();
  });
}
