// The functions Python calls: checks what memory safety rests on, chooses the kernels and
// shares the tasks out.
#include <atomic>
#include <functional>
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

// Queries of one forward task: few enough that the rows sampled for them by one head stay in the
// first-level cache for its next query, and enough to make handing out tasks free.
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

bool shapes_fit(const Problem& p) {
  int64_t tokens = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
    if (height < 1 || width < 1 || height > p.tokens || width > p.tokens / height) return false;
    tokens += height * width;
  }
  return tokens == p.tokens && tokens <= INT32_MAX && p.dim <= kMaxDim;
}

// A PointTable and the memory it lives in.
template <class C, class Int>
class OwnedTable {
 public:
  explicit OwnedTable(const Problem& p) {
    const int64_t num_points = p.levels * p.points;
    const int64_t padded = (num_points + kChunk - 1) / kChunk * kChunk;
    numbers_.reset(new C[2 * padded]);
    integers_.reset(new Int[3 * padded]);
    table = {numbers_.get(), numbers_.get() + padded, integers_.get(), integers_.get() + padded,
             integers_.get() + 2 * padded};
    int64_t start = 0;
    for (int64_t level = 0, i = 0; level < p.levels; ++level) {
      const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
      for (int64_t point = 0; point < p.points; ++point) set(i++, height, width, start);
      start += height * width;
    }
    for (int64_t i = num_points; i < padded; ++i) set(i, 1, 1, 0);
  }

  PointTable<C, Int> table;

 private:
  void set(int64_t i, int64_t height, int64_t width, int64_t start) {
    table.width[i] = static_cast<C>(width);
    table.height[i] = static_cast<C>(height);
    table.columns[i] = static_cast<Int>(width);
    table.lines[i] = static_cast<Int>(height);
    table.start[i] = static_cast<Int>(start);
  }

  std::unique_ptr<C[]> numbers_;
  std::unique_ptr<Int[]> integers_;
};

// Calls task(table, scratch, i) for every i below num_tasks; the scratch of `scratch_bytes` is the
// calling thread's alone.
template <class Task>
void for_each_task(const Problem& p, int64_t num_tasks, int64_t scratch_bytes, const void* table,
                   const Task& task) {
  const int threads = static_cast<int>(num_tasks < p.threads ? num_tasks : p.threads);
  constexpr std::align_val_t kAlignment{64};
  const int64_t slot_bytes = (scratch_bytes + 63) / 64 * 64;
  char* const scratch = static_cast<char*>(::operator new(threads * slot_bytes, kAlignment));
  std::atomic<int64_t> next_slot{0}, next_task{0};
  run_team(threads, [&] {
    void* const slot = scratch + next_slot++ * slot_bytes;
    for (int64_t i; (i = next_task++) < num_tasks;) task(table, slot, i);
  });
  ::operator delete(scratch, kAlignment);
}

template <class Task>
int32_t run(const Problem& p, int64_t num_tasks, int64_t scratch_bytes, const Task& task) {
  if (!shapes_fit(p)) return kBadShapes;
  if (num_tasks == 0) return kOk;
  try {
    if (p.dtype == kFloat64) {
      const OwnedTable<double, int64_t> owned(p);
      for_each_task(p, num_tasks, scratch_bytes, &owned.table, task);
    } else {
      const OwnedTable<float, int32_t> owned(p);
      for_each_task(p, num_tasks, scratch_bytes, &owned.table, task);
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
MMLITE_API int32_t mmlite_forward(const Problem* problem) {
  const Problem& p = *problem;
  const Kernels& kernels = kernels_of(p);
  const int64_t blocks = (p.queries + kQueriesPerTask - 1) / kQueriesPerTask;
  return run(p, p.batch * blocks, 0, [&](const void* table, void*, int64_t i) {
    const int64_t begin = i % blocks * kQueriesPerTask;
    const int64_t end = begin + kQueriesPerTask;
    kernels.forward(p, table, i / blocks, begin, end < p.queries ? end : p.queries);
  });
}

MMLITE_API int32_t mmlite_backward(const Problem* problem) {
  const Problem& p = *problem;
  const Kernels& kernels = kernels_of(p);
  const int64_t scratch_bytes = kernels.backward_scratch_bytes(p);
  return run(p, p.batch * p.heads, scratch_bytes, [&](const void* table, void* scratch, int64_t i) {
    kernels.backward(p, table, i / p.heads, i % p.heads, scratch);
  });
}
