// The reader that works everywhere: a few threads, each with one pread(2) under way.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "reader.h"
#include "requests.h"

namespace zipmoe {
namespace {

constexpr unsigned kThreads = 4;

class PreadReader final : public Reader {
 public:
  PreadReader(const ReadShape& shape, ReadSink& sink)
      : sink_(sink), requests_(shape.request_bytes) {
    const unsigned threads = shape.depth == 0 ? kThreads : shape.depth;
    try {
      for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~PreadReader() override { stop(); }

  void submit(const ReadJob& job) override {
    {
      const std::lock_guard lock(mutex_);
      requests_.add(job);
    }
    // A job is up to as many requests as there are threads, or more.
    work_.notify_all();
  }
  [[nodiscard]] std::string_view method() const override { return "pread"; }

 private:
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run() noexcept {
    try {
      while (auto request = wait_for_request()) {
        const ssize_t got = pread(request->job().file->fd(), request->data(), request->length,
                                  static_cast<off_t>(request->offset()));
        const std::int64_t outcome = got < 0 ? -std::int64_t{errno} : got;
        drop_cached(*request);
        settle(*request, outcome);
      }
    } catch (...) {
      sink_.reader_failed(std::current_exception());
    }
  }

  std::optional<Request> wait_for_request() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      if (auto request = requests_.next()) return request;
      work_.wait(lock);
    }
    return std::nullopt;
  }

  // A request to be tried again needs no wake-up: this very thread asks for work next.
  void settle(const Request& request, std::int64_t outcome) {
    std::optional<Finished> finished;
    {
      const std::lock_guard lock(mutex_);
      finished = requests_.settle(request, outcome);
    }
    if (finished) sink_.read_done(finished->tag, finished->result);
  }

  ReadSink& sink_;
  std::mutex mutex_;
  std::condition_variable work_;
  Requests requests_;      // guarded by mutex_
  bool stopping_ = false;  // guarded by mutex_
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(const ReadShape& shape, ReadSink& sink) {
  return std::make_unique<PreadReader>(shape, sink);
}

}  // namespace zipmoe
