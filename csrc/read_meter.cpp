#include "read_meter.h"

#include <array>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "error.h"

namespace zipmoe {
namespace {

using Clock = std::chrono::steady_clock;

// The drive must not wait for the next record to be asked for.
constexpr std::size_t kRecordsUnderWay = 4;

class Meter final : private ReadSink {
 public:
  Meter(const std::string& path, const ReaderChoice& choice, const ReadShape& shape,
        std::size_t record_bytes)
      : file_(path, choice.buffering),
        bytes_((record_bytes + kReadAlignment - 1) / kReadAlignment * kReadAlignment),
        arena_(bytes_ * kRecordsUnderWay) {
    if (bytes_ == 0 || file_.size() < bytes_)
      throw std::invalid_argument(path + " is shorter than a record of " + std::to_string(bytes_) +
                                  " bytes");
    reader_ = make_reader(choice, shape, *this);
  }

  double run(double seconds) {
    const auto begin = Clock::now();
    const auto end =
        begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    for (std::size_t place = 0; place < kRecordsUnderWay; ++place) submit(place);
    std::uint64_t records = 0;
    std::size_t under_way = kRecordsUnderWay;
    Clock::time_point last = begin;
    while (under_way != 0) {
      const std::size_t place = await_record();
      ++records;
      last = Clock::now();
      if (last < end)
        submit(place);
      else
        --under_way;
    }
    return static_cast<double>(records * bytes_) /
           std::chrono::duration<double>(last - begin).count();
  }

 private:
  void submit(std::size_t place) {
    std::uniform_int_distribution<std::uint64_t> pages(0, (file_.size() - bytes_) / kReadAlignment);
    stretches_[place] = {pages(random_) * kReadAlignment, arena_.at(place * bytes_, bytes_)};
    reader_->submit({.tag = place, .file = &file_, .stretches = {&stretches_[place], 1}});
  }

  std::size_t await_record() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !done_.empty() || broken_ || failed_; });
    if (broken_) std::rethrow_exception(broken_);
    if (failed_)
      throw FetchError("cannot read " + file_.path(), file_.path(), failed_->offset,
                       failed_->error);
    const std::size_t place = done_.back();
    done_.pop_back();
    return place;
  }

  void read_done(std::uint64_t tag, const ReadResult& result) noexcept override {
    const std::lock_guard lock(mutex_);
    if (result.ok())
      done_.push_back(static_cast<std::size_t>(tag));
    else
      failed_ = result;
    changed_.notify_one();
  }
  void reader_failed(std::exception_ptr cause) noexcept override {
    const std::lock_guard lock(mutex_);
    broken_ = std::move(cause);
    changed_.notify_one();
  }

  ShardFile file_;
  std::size_t bytes_;
  Arena arena_;
  std::array<Stretch, kRecordsUnderWay> stretches_;
  std::mt19937_64 random_{1};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::size_t> done_;
  std::optional<ReadResult> failed_;
  std::exception_ptr broken_;
  std::unique_ptr<Reader> reader_;  // last: it uses the others
};

}  // namespace

double measure_reads(const std::string& path, const ReaderChoice& choice, const ReadShape& shape,
                     std::size_t record_bytes, double seconds) {
  return Meter(path, choice, shape, record_bytes).run(seconds);
}

}  // namespace zipmoe
