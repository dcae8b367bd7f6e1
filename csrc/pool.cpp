#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <utility>

namespace zipmoe {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than what Python does between two products of a step, shorter than a person notices.
constexpr std::chrono::microseconds kSpin{1000};
constexpr unsigned kSpinsPerLook = 64;  // at the clock, which takes longer than a pause

// In the place of a piece: there is none.
constexpr std::uint32_t kClosed = std::numeric_limits<std::uint32_t>::max();

std::uint32_t number_of(std::uint64_t claim) { return static_cast<std::uint32_t>(claim >> 32); }

std::uint64_t claim_of(std::uint32_t number, std::uint64_t piece) {
  return std::uint64_t{number} << 32 | piece;
}

std::uint64_t num_pieces(std::uint64_t count, std::uint64_t grain) {
  return (count - 1) / grain + 1;
}

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

WorkerPool::WorkerPool(unsigned threads) : shares_(std::max(threads, 1U)) {
  for (Share& share : shares_) share.claim.store(kClosed, std::memory_order_relaxed);
  for (unsigned thread = 1; thread < threads; ++thread)
    workers_.emplace_back([this, thread] { worker(thread); });
}

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard lock(mutex_);
    ends_.store(true, std::memory_order_seq_cst);
  }
  wake_.notify_all();
}

void WorkerPool::run_job(const Job& job) {
  if (job.count == 0) return;
  const std::lock_guard one(callers_);
  const std::uint64_t pieces = num_pieces(job.count, job.grain);
  if (workers_.empty() || pieces == 1) {
    for (std::uint64_t begin = 0; begin < job.count; begin += job.grain)
      job.call(job.work, 0, begin, std::min(begin + job.grain, job.count));
    return;
  }
  if (pieces >= kClosed) throw std::length_error("a job of too many pieces");
  call_.store(job.call, std::memory_order_relaxed);
  work_.store(job.work, std::memory_order_relaxed);
  count_.store(job.count, std::memory_order_relaxed);
  grain_.store(job.grain, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  failure_ = nullptr;
  const std::uint32_t number = number_of(shares_[0].claim.load(std::memory_order_relaxed)) + 1;
  for (std::size_t share = 0; share < shares_.size(); ++share)
    shares_[share].claim.store(claim_of(number, pieces * share / shares_.size()),
                               std::memory_order_seq_cst);
  if (num_sleeping_.load(std::memory_order_seq_cst) != 0) {
    {
      const std::lock_guard lock(mutex_);
    }  // nobody is between its last look and its sleep
    wake_.notify_all();
  }
  work_on(number, 0);
  await_pieces(static_cast<std::uint32_t>(pieces));
  for (Share& share : shares_)
    share.claim.store(claim_of(number, kClosed), std::memory_order_release);
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void WorkerPool::work_on(std::uint32_t number, unsigned thread) noexcept {
  const auto shares = static_cast<unsigned>(shares_.size());
  for (unsigned k = 0; k < shares; ++k) work_on_share(number, thread, (thread + k) % shares);
}

void WorkerPool::work_on_share(std::uint32_t number, unsigned thread, unsigned share) noexcept {
  std::atomic<std::uint64_t>& next = shares_[share].claim;
  std::uint64_t claim = next.load(std::memory_order_acquire);
  for (;;) {
    const auto piece = static_cast<std::uint32_t>(claim);
    if (number_of(claim) != number || piece == kClosed) return;
    const Job job{call_.load(std::memory_order_relaxed), work_.load(std::memory_order_relaxed),
                  count_.load(std::memory_order_relaxed), grain_.load(std::memory_order_relaxed)};
    if (piece >= num_pieces(job.count, job.grain) * (share + 1) / shares_.size()) return;
    if (!next.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel,
                                    std::memory_order_acquire))
      continue;
    run_piece(job, thread, piece * job.grain);
    done_.fetch_add(1, std::memory_order_release);
    done_.notify_one();
    claim = next.load(std::memory_order_acquire);
  }
}

void WorkerPool::run_piece(const Job& job, unsigned thread, std::uint64_t begin) noexcept {
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    job.call(job.work, thread, begin, std::min(begin + job.grain, job.count));
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }
}

// Each is at work on its last piece.
void WorkerPool::await_pieces(std::uint32_t pieces) {
  std::uint32_t done = 0;
  spin([&] { return (done = done_.load(std::memory_order_acquire)) == pieces; });
  for (; done != pieces; done = done_.load(std::memory_order_acquire))
    done_.wait(done, std::memory_order_acquire);
}

void WorkerPool::worker(unsigned thread) noexcept {
  for (std::optional<std::uint32_t> number = 0; (number = await_job(*number, thread));)
    work_on(*number, thread);
}

std::optional<std::uint32_t> WorkerPool::await_job(std::uint32_t seen, unsigned thread) {
  const std::atomic<std::uint64_t>& claim = shares_[thread].claim;
  std::uint32_t number = seen;
  const auto is_over = [&] {
    number = number_of(claim.load(std::memory_order_seq_cst));
    return number != seen || ends_.load(std::memory_order_seq_cst);
  };
  if (!spin(is_over)) {
    std::unique_lock lock(mutex_);
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, is_over);
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }
  if (ends_.load(std::memory_order_seq_cst)) return std::nullopt;
  return number;
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
