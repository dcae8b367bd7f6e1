// The threads that multiply. The caller is one of them, so a pool of one has no threads at all.
//
// Between the calls of one step workers spin, for at most kSpin: waking a sleeping thread takes
// longer than many a product. After that they sleep. Work is cut into pieces, and each thread has a
// share of pieces that follow each other: kernels ask memory for what lies behind what they read,
// and that is then their own next piece. A thread that is done with its share goes on with those of
// others; which thread computes a piece never changes a result, because every output belongs to one
// piece. A caller waits for pieces, not for workers: one whose processor does something else, or
// that has yet to wake, holds nobody up unless it holds a piece.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace zipmoe {

class WorkerPool {
 public:
  // Threads with the caller's included; 0 counts as 1. Workers are not bound to processors: one
  // that is would wait behind a caller that spins where it is bound, while another processor idles.
  explicit WorkerPool(unsigned threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  [[nodiscard]] unsigned num_threads() const { return static_cast<unsigned>(workers_.size()) + 1; }

  // Calls work(thread, begin, end) for pieces of at most `grain` of 0..count; `thread` is below
  // num_threads() and no two pieces run with the same one at once. Waits for all, then rethrows the
  // first failure; pieces that had not begun by then are left out. One caller at a time: a second
  // one waits. Not to be called from within work, nor in a forked child.
  template <class Work>
  void run(std::uint64_t count, std::uint64_t grain, const Work& work) {
    const Job job{&call<Work>, &work, count, grain == 0 ? 1 : grain};
    run_job(job);
  }

 private:
  struct Job {
    void (*call)(const void*, unsigned, std::uint64_t, std::uint64_t) = nullptr;
    const void* work = nullptr;
    std::uint64_t count = 0;
    std::uint64_t grain = 1;
  };
  template <class Work>
  static void call(const void* work, unsigned thread, std::uint64_t begin, std::uint64_t end) {
    (*static_cast<const Work*>(work))(thread, begin, end);
  }

  void run_job(const Job& job);
  void work_on(std::uint32_t number, unsigned thread) noexcept;
  void work_on_share(std::uint32_t number, unsigned thread, unsigned share) noexcept;
  void run_piece(const Job& job, unsigned thread, std::uint64_t begin) noexcept;
  void await_pieces(std::uint32_t pieces);
  void worker(unsigned thread) noexcept;
  // The number of a job after `seen`; nothing when the pool ends.
  std::optional<std::uint32_t> await_job(std::uint32_t seen, unsigned thread);

  std::mutex callers_;  // one job at a time

  // The latest job. Written while all shares say that there is none to be had.
  std::atomic<void (*)(const void*, unsigned, std::uint64_t, std::uint64_t)> call_ = nullptr;
  std::atomic<const void*> work_ = nullptr;
  std::atomic<std::uint64_t> count_ = 0, grain_ = 1;
  // The job's number, and below it the next piece of the share that nobody has taken, or kClosed. A
  // piece is taken by raising it, which fails if the job has changed: then what was read of the job
  // is forgotten.
  struct alignas(64) Share {
    std::atomic<std::uint64_t> claim;
  };
  std::vector<Share> shares_;                        // of each thread
  alignas(64) std::atomic<std::uint32_t> done_ = 0;  // pieces
  alignas(64) std::atomic<unsigned> num_sleeping_ = 0;
  std::atomic<bool> failed_ = false;
  std::atomic<bool> ends_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::exception_ptr failure_;
  std::vector<std::jthread> workers_;
};

// The pool that all models of this process share, one thread for each core of the affinity mask or
// as many as set_num_threads said. A forked child gets a pool of its own.
std::shared_ptr<WorkerPool> shared_pool();
// From the next call of shared_pool on. 0: one for each core.
void set_num_threads(unsigned threads);

}  // namespace zipmoe
