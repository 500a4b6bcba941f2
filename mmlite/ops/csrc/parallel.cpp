#include "parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

std::atomic<GompParallel> gomp_parallel{nullptr};

// libgomp cannot start a team in a child of fork(): its threads stayed behind in the parent.
std::atomic<bool> forked{false};
#if !defined(_WIN32)
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

void call(void* work) { (*static_cast<const std::function<void()>*>(work))(); }

}  // namespace

void set_gomp_parallel(GompParallel entry) { gomp_parallel = entry; }

void run_team(int threads, const std::function<void()>& work) {
  if (threads <= 1) return work();
  const GompParallel parallel = gomp_parallel;
  if (parallel && !forked) {
    void* const data = const_cast<void*>(static_cast<const void*>(&work));
    return parallel(call, data, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    while (static_cast<int>(helpers.size()) < threads - 1) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do it all.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}
