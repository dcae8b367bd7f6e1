// The bookkeeping that all readers share: jobs cut into requests, and what to do when one ends
// badly. Pure: no files, threads or locks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <optional>

#include "reader.h"

namespace zipmoe {

// A job in the making.
struct Transfer {
  ReadJob job;
  std::size_t stretch = 0;         // the first that is not handed out whole
  std::size_t issued = 0;          // bytes of it handed out in requests so far
  std::size_t num_unfinished = 0;  // requests handed out, or waiting to be tried again
  ReadResult result;

  [[nodiscard]] bool all_issued() const { return stretch == job.stretches.size(); }
};

// A piece of a stretch.
struct Request {
  std::list<Transfer>::iterator transfer;
  const Stretch* stretch = nullptr;
  std::size_t at = 0;  // bytes from the stretch's start
  std::size_t length = 0;
  unsigned num_interrupts = 0;
  unsigned num_stalls = 0;
  bool failed_once = false;

  [[nodiscard]] const ReadJob& job() const { return transfer->job; }
  [[nodiscard]] std::uint64_t offset() const { return stretch->offset + at; }
  [[nodiscard]] std::byte* data() const { return stretch->into.data() + at; }
};

struct Finished {
  std::uint64_t tag = 0;
  ReadResult result;
};

// Requests are handed out in the order of their jobs; those to be tried again come first.
class Requests {
 public:
  explicit Requests(std::size_t request_bytes) : request_bytes_(request_bytes) {}

  void add(const ReadJob& job);
  // Nothing where all is handed out.
  std::optional<Request> next();
  // `outcome`: what read(2) says: bytes, 0 at the end of the file, or minus errno.
  // Returns the job if this was the last of it.
  std::optional<Finished> settle(Request request, std::int64_t outcome);

 private:
  enum class Verdict { done, again, failed };
  static Verdict judge(Request& request, std::int64_t outcome);
  static Verdict judge_error(Request& request, int error);

  std::size_t request_bytes_;
  std::list<Transfer> transfers_;
  std::deque<Request> again_;
};

// After a buffered read: the page cache must not keep what the expert cache keeps.
void drop_cached(const Request& request);

}  // namespace zipmoe
