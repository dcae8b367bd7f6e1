#include "requests.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

namespace zipmoe {
namespace {

// EINTR and EAGAIN are no errors, but a system that says nothing else must not hang us.
constexpr unsigned kMaxInterrupts = 10000;
// A read that stops inside an aligned unit is asked for once more; doing it again is the file's
// end.
constexpr unsigned kMaxStalls = 1;

}  // namespace

void Requests::add(const ReadJob& job) { transfers_.push_back(Transfer{.job = job, .result = {}}); }

std::optional<Request> Requests::next() {
  if (!again_.empty()) {
    Request request = again_.front();
    again_.pop_front();
    return request;
  }
  for (auto transfer = transfers_.begin(); transfer != transfers_.end(); ++transfer) {
    if (transfer->all_issued() || !transfer->result.ok()) continue;
    const Stretch& stretch = transfer->job.stretches[transfer->stretch];
    Request request{.transfer = transfer, .stretch = &stretch, .at = transfer->issued};
    request.length = std::min(stretch.into.size() - request.at, request_bytes_);
    transfer->issued += request.length;
    if (transfer->issued == stretch.into.size()) {
      ++transfer->stretch;
      transfer->issued = 0;
    }
    ++transfer->num_unfinished;
    return request;
  }
  return std::nullopt;
}

std::optional<Finished> Requests::settle(Request request, std::int64_t outcome) {
  Transfer& transfer = *request.transfer;
  const Verdict verdict = judge(request, outcome);
  if (verdict == Verdict::again && transfer.result.ok()) {
    again_.push_back(request);
    return std::nullopt;
  }
  if (verdict == Verdict::failed && transfer.result.ok()) {
    transfer.result.error = outcome < 0 ? static_cast<int>(-outcome) : 0;
    transfer.result.end_of_file = outcome >= 0;
    transfer.result.offset = request.offset();
  }
  --transfer.num_unfinished;
  if (transfer.num_unfinished > 0 || (transfer.result.ok() && !transfer.all_issued()))
    return std::nullopt;
  Finished finished{.tag = transfer.job.tag, .result = transfer.result};
  transfers_.erase(request.transfer);
  return finished;
}

Requests::Verdict Requests::judge(Request& request, std::int64_t outcome) {
  if (outcome < 0) return judge_error(request, static_cast<int>(-outcome));
  auto got = static_cast<std::size_t>(outcome);
  if (got >= request.length) return Verdict::done;
  if (got == 0) return Verdict::failed;
  // A direct read can only go on from an aligned place.
  if (request.job().file->direct()) got -= got % kReadAlignment;
  request.num_stalls = got == 0 ? request.num_stalls + 1 : 0;
  if (request.num_stalls > kMaxStalls) return Verdict::failed;
  request.at += got;
  request.length -= got;
  return Verdict::again;
}

Requests::Verdict Requests::judge_error(Request& request, int error) {
  if (error == EINTR || error == EAGAIN) {
    return request.num_interrupts++ < kMaxInterrupts ? Verdict::again : Verdict::failed;
  }
  // Drives do recover from a bad transfer, once.
  if (error == EIO && !request.failed_once) {
    request.failed_once = true;
    ++request.transfer->result.retried;
    return Verdict::again;
  }
  return Verdict::failed;
}

void drop_cached(const Request& request) {
  if (request.job().file->direct()) return;
  // Advice: a filesystem that keeps its pages in memory anyway (tmpfs) ignores it.
  (void)posix_fadvise(request.job().file->fd(), static_cast<off_t>(request.offset()),
                      static_cast<off_t>(request.length), POSIX_FADV_DONTNEED);
}

}  // namespace zipmoe
