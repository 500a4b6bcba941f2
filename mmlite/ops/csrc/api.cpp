// The functions Python calls: checks what memory safety rests on, chooses the kernels and
// shares the tasks out.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "kernels.h"
#include "parallel.h"

#if defined(_WIN32)
#define MMLITE_API extern "C" __declspec(dllexport)
#else
#define MMLITE_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Tokens that one task copies.
constexpr int64_t kTokensPerTask = 1024;

const Kernels& kernels_of(const Problem& p) {
#if defined(MMLITE_X86)
  if (p.dtype != kFloat64) {
    if (p.isa == kAvx512) return kAvx512Kernels;
    if (p.isa == kAvx2) return kAvx2Kernels;
  }
#endif
  return kBaselineKernels;
}

int64_t element_size(const Problem& p) {
  return p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2;
}

char* row_of(const Problem& p, const Rows& rows, int64_t batch, int64_t row, int64_t head) {
  const int64_t offset =
      batch * rows.batch_stride + row * rows.row_stride + head * rows.head_stride;
  return static_cast<char*>(rows.data) + offset * element_size(p);
}

bool shapes_fit(const Problem& p) {
  if (p.tokens > INT32_MAX || p.dim > kMaxDim) return false;
  int64_t tokens = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
    if (height < 1 || width < 1 || height > p.tokens || width > p.tokens / height) return false;
    tokens += height * width;
  }
  return tokens == p.tokens;
}

// A PointTable and the memory it lives in.
template <class C, class Int>
class OwnedTable {
 public:
  OwnedTable(const Problem& p, int64_t stride) {
    const int64_t num_points = p.levels * p.points;
    const int64_t padded = (num_points + kChunk - 1) / kChunk * kChunk;
    numbers_.reset(new C[2 * padded]);
    integers_.reset(new Int[2 * padded]);
    table = {numbers_.get(), numbers_.get() + padded, integers_.get(), integers_.get() + padded,
             static_cast<Int>(stride)};
    int64_t start = 0;
    for (int64_t level = 0, i = 0; level < p.levels; ++level) {
      const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
      for (int64_t point = 0; point < p.points; ++point, ++i) {
        set(i, height, width, start * stride, width * stride);
      }
      start += height * width;
    }
    for (int64_t i = num_points; i < padded; ++i) set(i, 1, 1, 0, 0);
  }

  PointTable<C, Int> table;

 private:
  void set(int64_t i, int64_t height, int64_t width, int64_t start, int64_t line) {
    table.width[i] = static_cast<C>(width);
    table.height[i] = static_cast<C>(height);
    table.start[i] = static_cast<Int>(start);
    table.line[i] = static_cast<Int>(line);
  }

  std::unique_ptr<C[]> numbers_;
  std::unique_ptr<Int[]> integers_;
};

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data(static_cast<char*>(::operator new(bytes, kAlignment))) {}
  ~Scratch() { ::operator delete(data, kAlignment); }
  Scratch(const Scratch&) = delete;

  char* const data;

 private:
  static constexpr std::align_val_t kAlignment{64};
};

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

Slice slice_of(const Problem& p, int64_t i) {
  const int64_t b = i / p.heads, m = i % p.heads;
  return {b, m, row_of(p, p.key.data ? p.key : p.value, b, 0, m), row_of(p, p.value, b, 0, m)};
}

// A copy of the rows of one head, token after token; a key apart lies behind its value.
struct PackedLayout {
  explicit PackedLayout(const Problem& problem)
      : p(problem),
        row_bytes(p.dim * element_size(p)),
        key_offset(p.key.data ? row_bytes : 0),
        stride(p.key.data ? 2 * p.dim : p.dim),
        bytes((p.tokens * stride * element_size(p) + 63) / 64 * 64) {}

  void pack(const Slice& from, int64_t begin, int64_t end, char* to) const {
    for (int64_t token = begin; token < end; ++token) {
      char* const row = to + token * stride * element_size(p);
      memcpy(row, row_of(p, p.value, from.batch, token, from.head), row_bytes);
      if (key_offset == 0) continue;
      memcpy(row + key_offset, row_of(p, p.key, from.batch, token, from.head), row_bytes);
    }
  }

  void unpack_grads(const Slice& slice, const char* from) const {
    for (int64_t token = 0; token < p.tokens; ++token) {
      const char* const row = from + token * stride * element_size(p);
      memcpy(row_of(p, p.grad_value, slice.batch, token, slice.head), row, row_bytes);
      if (key_offset == 0) continue;
      memcpy(row_of(p, p.grad_key, slice.batch, token, slice.head), row + key_offset, row_bytes);
    }
  }

  Slice slice(const Slice& original, const char* packed) const {
    return {original.batch, original.head, packed + key_offset, packed};
  }

  const Problem& p;
  const int64_t row_bytes;
  const int64_t key_offset;  // in bytes, zero where the value is its own key
  const int64_t stride;      // of the tokens, in elements
  const int64_t bytes;
};

// Whether copying the rows of a head together pays. In (B, S, M, D) the rows of one head lie M*D
// elements apart, which leaves them an M-th of every cache's sets and pages of the TLB; a copy
// costs about as much as sampling each row a few dozen times from the cache saves.
bool worth_packing(const Problem& p) {
  return p.queries * p.levels * p.points >= 8 * p.tokens && p.value.row_stride != p.dim;
}

// Whether the kernels can step through the tensors as they are.
bool addressable(const Problem& p) {
  return p.tokens * p.value.row_stride <= INT32_MAX &&
         (!p.key.data || p.key.row_stride == p.value.row_stride);
}

// Calls body(table) with the PointTable for rows `stride` elements apart, and returns a Status.
template <class Body>
int32_t with_table(const Problem& p, int64_t stride, const Body& body) {
  if (!shapes_fit(p)) return kBadShapes;
  if (p.dtype != kFloat64 && p.tokens * stride > INT32_MAX) return kTooLarge;
  try {
    if (p.dtype == kFloat64) {
      const OwnedTable<double, int64_t> owned(p, stride);
      body(&owned.table);
    } else {
      const OwnedTable<float, int32_t> owned(p, stride);
      body(&owned.table);
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

}  // namespace

// The best instruction set of this machine, an Isa.
MMLITE_API int32_t mmlite_best_isa() {
#if defined(MMLITE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

MMLITE_API void mmlite_set_openmp(void* gomp_parallel) {
  set_gomp_parallel(reinterpret_cast<GompParallel>(gomp_parallel));
}

// Both return a Status.
MMLITE_API int32_t mmlite_interface() { return kInterface; }

MMLITE_API int32_t mmlite_forward(const Problem* problem) {
  const Problem& p = *problem;
  const Kernels& kernels = kernels_of(p);
  const bool packs = worth_packing(p) || !addressable(p);
  const PackedLayout layout(p);
  return with_table(p, packs ? layout.stride : p.value.row_stride, [&](const void* table) {
    const int64_t num_slices = p.batch * p.heads;
    // As many heads at a time as there are threads: the scratch grows with the threads alone.
    const int64_t group = std::min<int64_t>(num_slices, p.threads);
    const Scratch scratch(packs ? group * layout.bytes : 0);

    for (int64_t first = 0; first < num_slices; first += group) {
      const int64_t slices = std::min(group, num_slices - first);
      if (packs) {
        const int64_t blocks = (p.tokens + kTokensPerTask - 1) / kTokensPerTask;
        for_each_task(p, slices * blocks, [&](int64_t task, int64_t) {
          const int64_t i = task % slices, begin = task / slices * kTokensPerTask;
          layout.pack(slice_of(p, first + i), begin, std::min(begin + kTokensPerTask, p.tokens),
                      scratch.data + i * layout.bytes);
        });
      }

      // Threads that keep step stay each with one head, and go through its queries in order.
      const int64_t wanted = std::max<int64_t>(8, 4 * p.threads / slices);
      const int64_t block_size = std::max<int64_t>(64, (p.queries + wanted - 1) / wanted);
      const int64_t blocks = (p.queries + block_size - 1) / block_size;
      for_each_task(p, slices * blocks, [&](int64_t task, int64_t) {
        Slice slice = slice_of(p, first + task % slices);
        if (packs) slice = layout.slice(slice, scratch.data + task % slices * layout.bytes);
        const int64_t begin = task / slices * block_size;
        kernels.forward(p, table, slice, begin, std::min(begin + block_size, p.queries));
      });
    }
  });
}

MMLITE_API int32_t mmlite_backward(const Problem* problem) {
  const Problem& p = *problem;
  const Kernels& kernels = kernels_of(p);
  const PackedLayout layout(p);
  return with_table(p, layout.stride, [&](const void* table) {
    // One task a head: it works on copies of its rows, sums their gradients in the order of the
    // queries, whatever the number of threads, and writes them out in the end.
    const int64_t num_slices = p.batch * p.heads;
    const int64_t kernel_bytes = kernels.backward_scratch_bytes(p);
    const int64_t slot_bytes = kernel_bytes + 2 * layout.bytes;
    const Scratch scratch(std::min<int64_t>(num_slices, p.threads) * slot_bytes);
    for_each_task(p, num_slices, [&](int64_t i, int64_t slot) {
      char* const kernel_scratch = scratch.data + slot * slot_bytes;
      char* const rows = kernel_scratch + kernel_bytes;
      char* const grads = rows + layout.bytes;
      const Slice slice = slice_of(p, i);
      layout.pack(slice, 0, p.tokens, rows);
      memset(grads, 0, layout.bytes);
      kernels.backward(p, table, layout.slice(slice, rows),
                       {grads + layout.key_offset, grads}, kernel_scratch);
      layout.unpack_grads(slice, grads);
    });
  });
}
