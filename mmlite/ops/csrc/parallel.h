// Tasks on threads: torch's own OpenMP team where there is one, so that no second pool competes
// with it for the cores.
#ifndef MMLITE_PARALLEL_H
#define MMLITE_PARALLEL_H

#include <stdint.h>

#include <functional>

// Runs `work` on up to `threads` threads at once and returns when all have come back. `work`
// shares the tasks out by itself; it may run on fewer threads, even on the caller alone.
void run_team(int threads, const std::function<void()>& work);

// OpenMP's entry point for a parallel region, as the libgomp ABI defines it (LLVM's and Intel's
// runtimes provide it too).
typedef void (*GompParallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void set_gomp_parallel(GompParallel entry);

#endif
