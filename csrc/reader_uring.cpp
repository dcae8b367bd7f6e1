// The reader of a ring: one thread owns it, keeps some requests under way and sleeps in between.
#include "reader.h"

#ifndef ZIPMOE_HAVE_URING

namespace zipmoe {
std::unique_ptr<Reader> make_uring_reader(const ReadShape& /*shape*/, ReadSink& /*sink*/) {
  return nullptr;
}
}  // namespace zipmoe

#else

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "requests.h"

namespace zipmoe {
namespace {

// Tag of the request that waits for a wake-up; the others are places in under_way_.
constexpr std::uint64_t kWakeUp = kMaxDepth;
constexpr unsigned kDepth = 8;

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

class Ring {
 public:
  // Two entries more than can be under way at once, the waking one included: a full ring cannot be.
  explicit Ring(unsigned depth) : error_(-io_uring_queue_init(2 * depth, &ring_, 0)) {}
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() {
    if (error_ == 0) io_uring_queue_exit(&ring_);
  }

  // False where the system has no rings, forbids them, or has them without plain reads
  // (before 5.6).
  [[nodiscard]] bool works() {
    if (error_ != 0) return false;
    io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
    if (probe == nullptr) return false;
    const bool reads = io_uring_opcode_supported(probe, IORING_OP_READ) != 0;
    io_uring_free_probe(probe);
    return reads;
  }
  io_uring* get() { return &ring_; }

 private:
  io_uring ring_{};
  int error_;
};

class EventFd {
 public:
  EventFd() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) fail(errno, "eventfd");
  }
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;
  ~EventFd() { close(fd_); }
  [[nodiscard]] int fd() const { return fd_; }
  // EAGAIN would mean 2^64 - 1 wake-ups not seen yet, and then one more changes nothing.
  void signal() const { (void)eventfd_write(fd_, 1); }
  void clear() const {
    eventfd_t count = 0;
    (void)eventfd_read(fd_, &count);
  }

 private:
  int fd_;
};

// Hands on finished jobs in a thread of its own.
class Reporter {
 public:
  explicit Reporter(ReadSink& sink) : sink_(sink), thread_([this] { run(); }) {}
  Reporter(const Reporter&) = delete;
  Reporter& operator=(const Reporter&) = delete;
  // Drops what is not reported yet.
  ~Reporter() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    thread_.join();
  }

  void push(const Finished& job) {
    {
      const std::lock_guard lock(mutex_);
      finished_.push_back(job);
    }
    work_.notify_one();
  }

 private:
  void run() noexcept {
    try {
      while (auto job = wait_for_job()) sink_.read_done(job->tag, job->result);
    } catch (...) {
      sink_.reader_failed(std::current_exception());
    }
  }

  std::optional<Finished> wait_for_job() {
    std::unique_lock lock(mutex_);
    work_.wait(lock, [this] { return stopping_ || !finished_.empty(); });
    if (stopping_) return std::nullopt;
    const Finished job = finished_.front();
    finished_.pop_front();
    return job;
  }

  ReadSink& sink_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Finished> finished_;  // guarded by mutex_
  bool stopping_ = false;          // guarded by mutex_
  std::thread thread_;             // last: it uses the others
};

unsigned depth_of(const ReadShape& shape) { return shape.depth == 0 ? kDepth : shape.depth; }

class UringReader final : public Reader {
 public:
  UringReader(const ReadShape& shape, ReadSink& sink)
      : sink_(sink),
        requests_(shape.request_bytes),
        ring_(depth_of(shape)),
        under_way_(depth_of(shape)) {}
  ~UringReader() override {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.signal();
    thread_.join();
  }

  // False where this system has no usable ring.
  bool start() {
    if (!ring_.works()) return false;
    reporter_.emplace(sink_);
    thread_ = std::thread([this] { run(); });
    return true;
  }

  void submit(const ReadJob& job) override {
    {
      const std::lock_guard lock(mutex_);
      requests_.add(job);
    }
    wake_.signal();
  }
  [[nodiscard]] std::string_view method() const override { return "io_uring"; }

 private:
  void run() noexcept {
    try {
      while (fill()) {
        wait();
        reap();
      }
    } catch (...) {
      sink_.reader_failed(std::current_exception());
    }
  }

  // Puts requests into the ring up to the queue depth. False once it is time to end: asked to stop
  // and nothing under way any more.
  bool fill() {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < under_way_.size() && !stopping_; ++i) {
      if (under_way_[i]) continue;
      under_way_[i] = requests_.next();
      if (!under_way_[i]) break;
      const Request& request = *under_way_[i];
      io_uring_sqe* entry = next_entry();
      io_uring_prep_read(entry, request.job().file->fd(), request.data(),
                         static_cast<unsigned>(request.length), request.offset());
      io_uring_sqe_set_data64(entry, i);
      ++num_under_way_;
    }
    return !stopping_ || num_under_way_ > 0;
  }

  // Submits what fill() prepared and sleeps until something ends.
  void wait() {
    if (!std::exchange(armed_, true)) {
      io_uring_sqe* entry = next_entry();
      io_uring_prep_poll_add(entry, wake_.fd(), POLLIN);
      io_uring_sqe_set_data64(entry, kWakeUp);
    }
    const int submitted = io_uring_submit_and_wait(ring_.get(), 1);
    if (submitted >= 0 || submitted == -EINTR) return;
    if (submitted != -EAGAIN && submitted != -EBUSY) fail(-submitted, "io_uring_submit_and_wait");
    // The kernel is short of memory for a moment; the entries stay in the ring.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  void reap() {
    io_uring_cqe* entry = nullptr;
    while (io_uring_peek_cqe(ring_.get(), &entry) == 0 && entry != nullptr) {
      const std::uint64_t tag = io_uring_cqe_get_data64(entry);
      const int outcome = entry->res;
      io_uring_cqe_seen(ring_.get(), entry);
      if (tag == kWakeUp) {
        if (outcome < 0) fail(-outcome, "poll of the reader's eventfd");
        armed_ = false;
        wake_.clear();
      } else {
        settle(static_cast<std::size_t>(tag), outcome);
      }
    }
  }

  void settle(std::size_t place, int outcome) {
    const Request request = *std::exchange(under_way_.at(place), std::nullopt);
    --num_under_way_;
    drop_cached(request);
    std::optional<Finished> finished;
    {
      const std::lock_guard lock(mutex_);
      finished = requests_.settle(request, outcome);
    }
    if (finished) reporter_->push(*finished);
  }

  io_uring_sqe* next_entry() {
    io_uring_sqe* entry = io_uring_get_sqe(ring_.get());
    if (entry == nullptr) throw std::logic_error("the ring of the reader is full");
    return entry;
  }

  ReadSink& sink_;
  EventFd wake_;
  std::mutex mutex_;
  Requests requests_;      // guarded by mutex_
  bool stopping_ = false;  // guarded by mutex_

  // Only the reader's thread touches these.
  Ring ring_;
  std::vector<std::optional<Request> > under_way_;
  unsigned num_under_way_ = 0;
  bool armed_ = false;

  std::optional<Reporter> reporter_;  // there from start() on
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(const ReadShape& shape, ReadSink& sink) {
  auto reader = std::make_unique<UringReader>(shape, sink);
  if (!reader->start()) return nullptr;
  return reader;
}

}  // namespace zipmoe

#endif
