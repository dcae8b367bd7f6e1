#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace zipmoe {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than what Python does between two products of a step, shorter than a person notices.
constexpr std::chrono::microseconds kSpin{1000};
constexpr unsigned kSpinsPerLook = 64;  // at the clock, which takes longer than a pause

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until it is so, but not for longer than kSpin; says whether it is.
template <class Condition>
bool spin(const Condition& is_so) {
  const auto until = Clock::now() + kSpin;
  do {
    for (unsigned i = 0; i < kSpinsPerLook; ++i) {
      if (is_so()) return true;
      pause();
    }
  } while (Clock::now() < until);
  return false;
}

unsigned num_allowed_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return static_cast<unsigned>(std::max(1, CPU_COUNT(&set)));
}

}  // namespace

WorkerPool::WorkerPool(unsigned threads) {
  for (unsigned thread = 1; thread < threads; ++thread)
    workers_.emplace_back([this, thread] { worker(thread); });
}

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard lock(mutex_);
    number_.fetch_add(1, std::memory_order_seq_cst);
  }
  wake_.notify_all();
}

void WorkerPool::run_job(const Job& job) {
  if (job.count == 0) return;
  const std::lock_guard one(callers_);
  if (workers_.empty() || job.count <= job.grain) {
    for (std::uint64_t begin = 0; begin < job.count; begin += job.grain)
      job.call(job.work, 0, begin, std::min(begin + job.grain, job.count));
    return;
  }
  job_ = job;
  next_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  failure_ = nullptr;
  num_working_.store(static_cast<unsigned>(workers_.size()), std::memory_order_relaxed);
  number_.fetch_add(2, std::memory_order_seq_cst);
  if (num_sleeping_.load(std::memory_order_seq_cst) != 0) {
    {
      const std::lock_guard lock(mutex_);
    }  // nobody is between its last look and its sleep
    wake_.notify_all();
  }
  work_on(job, 0);
  await_workers();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void WorkerPool::work_on(const Job& job, unsigned thread) noexcept {
  while (!failed_.load(std::memory_order_relaxed)) {
    const std::uint64_t begin = next_.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.count) return;
    try {
      job.call(job.work, thread, begin, std::min(begin + job.grain, job.count));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
  }
}

void WorkerPool::worker(unsigned thread) noexcept {
  for (std::uint64_t seen = 1; (seen = await_job(seen)) != 0;) {
    work_on(job_, thread);
    if (num_working_.fetch_sub(1, std::memory_order_acq_rel) == 1) num_working_.notify_one();
  }
}

// Each is at its last piece, or has yet to find that there is none.
void WorkerPool::await_workers() {
  unsigned working = 1;
  spin([&] { return (working = num_working_.load(std::memory_order_acquire)) == 0; });
  for (; working != 0; working = num_working_.load(std::memory_order_acquire))
    num_working_.wait(working, std::memory_order_acquire);
}

std::uint64_t WorkerPool::await_job(std::uint64_t seen) {
  std::uint64_t number;
  const auto is_new = [&] {
    number = number_.load(std::memory_order_seq_cst);
    return number != seen;
  };
  if (spin(is_new)) return number % 2 == 0 ? 0 : number;
  std::unique_lock lock(mutex_);
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, is_new);
  num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  return number % 2 == 0 ? 0 : number;
}

namespace {

struct Shared {
  std::mutex mutex;
  std::shared_ptr<WorkerPool> pool;
  unsigned threads = 0;
  pid_t owner = 0;
};

Shared& shared() {
  static auto* const kept = new Shared;  // never destroyed: threads may outlive static objects
  return *kept;
}

}  // namespace

std::shared_ptr<WorkerPool> shared_pool() {
  Shared& kept = shared();
  const std::lock_guard lock(kept.mutex);
  if (kept.pool && kept.owner != getpid()) {
    // The parent's threads are not here, and cannot be joined.
    new std::shared_ptr<WorkerPool>(std::move(kept.pool));
    kept.pool = nullptr;
  }
  if (!kept.pool) {
    kept.pool =
        std::make_shared<WorkerPool>(kept.threads == 0 ? num_allowed_processors() : kept.threads);
    kept.owner = getpid();
  }
  return kept.pool;
}

void set_num_threads(unsigned threads) {
  Shared& kept = shared();
  const std::lock_guard lock(kept.mutex);
  if (kept.threads == threads) return;
  kept.threads = threads;
  if (kept.owner == getpid()) kept.pool = nullptr;
}

}  // namespace zipmoe
