// Reads stretches of files into memory, in the background, and reports each when it is done.
// Knows files and offsets; nothing of experts, slots or codecs.
#pragma once
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace zipmoe {

// Offsets, lengths and addresses of reads are multiples of it: what O_DIRECT asks for on any drive.
inline constexpr std::size_t kReadAlignment = 4096;
// How a drive is asked: reads are cut into requests of this size, and so many of them are kept
// under way. Best measured for each drive (read_meter.h); what stands here was the fastest of those
// tried on random records of 5.8 MB on one drive (docs/decisions/0005-reader.md).
struct ReadShape {
  std::size_t request_bytes = std::size_t{1} << 20;  // a multiple of kReadAlignment
  unsigned depth = 0;                                // 0: 8 for a ring, 4 for threads
};
inline constexpr unsigned kMaxDepth = 64;
inline constexpr std::size_t kMaxRequestBytes = std::size_t{16} << 20;

enum class Buffering { if_needed, never, always };

// A shard open for reading. Regular files only, and no symbolic links.
class ShardFile {
 public:
  // Direct reads (O_DIRECT) leave the page cache alone. Buffering::if_needed takes them where the
  // filesystem allows, never insists on them, always does without.
  // Throws FetchError where the file cannot be opened, FormatError where it is not a regular file.
  explicit ShardFile(std::string path, Buffering buffering = Buffering::if_needed);
  ShardFile(ShardFile&& other) noexcept;
  ShardFile& operator=(ShardFile&&) = delete;
  ShardFile(const ShardFile&) = delete;
  ShardFile& operator=(const ShardFile&) = delete;
  ~ShardFile();

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] std::uint64_t size() const { return size_; }
  [[nodiscard]] bool direct() const { return direct_; }

 private:
  void open_file(bool direct);
  [[nodiscard]] bool takes_direct_reads() const;

  std::string path_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
  bool direct_ = false;
};

// One stretch to read; offset, length and address are multiples of kReadAlignment.
struct Stretch {
  std::uint64_t offset = 0;  // in the file
  std::span<std::byte> into;
};

// Stretches of one file that are reported together: at least one, none empty.
struct ReadJob {
  std::uint64_t tag = 0;  // handed back with the result
  const ShardFile* file = nullptr;
  std::span<const Stretch> stretches;  // must live until the job is reported
};

struct ReadResult {
  int error = 0;              // errno, 0 where all bytes are there
  bool end_of_file = false;   // the file ended too early
  std::uint64_t offset = 0;   // in the file, of the request that failed
  std::uint64_t retried = 0;  // errors that a second try cured

  [[nodiscard]] bool ok() const { return error == 0 && !end_of_file; }
};

// Who is told. Called from the reader's own threads, holding no lock of the reader.
class ReadSink {
 public:
  // Called exactly once for every job, unless the reader is destroyed or fails before.
  virtual void read_done(std::uint64_t tag, const ReadResult& result) noexcept = 0;
  // The reader itself is at its end: no further job will be done.
  virtual void reader_failed(std::exception_ptr cause) noexcept = 0;

 protected:
  ~ReadSink() = default;
};

class Reader {
 public:
  Reader() = default;
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  // Waits for requests under way, drops the others, joins its threads.
  virtual ~Reader() = default;

  // Never waits for a read. Jobs are served in order; those of one call of read_done may submit
  // again.
  virtual void submit(const ReadJob& job) = 0;
  [[nodiscard]] virtual std::string_view method() const = 0;
};

// The reader of a ring, or nullptr where this build or this system (an old kernel, a container that
// forbids it) has none.
std::unique_ptr<Reader> make_uring_reader(const ReadShape& shape, ReadSink& sink);
// The reader of a few threads, each with one request under way: works everywhere.
std::unique_ptr<Reader> make_pread_reader(const ReadShape& shape, ReadSink& sink);

// What the caller asked for by name: "", "io_uring" or "pread", with "+direct" or "+buffered" to
// insist.
struct ReaderChoice {
  bool uring = true;
  bool pread = true;
  Buffering buffering = Buffering::if_needed;
};
// Throws std::invalid_argument for any other name.
ReaderChoice reader_choice(std::string_view name);
// Throws std::invalid_argument where io_uring is insisted on and not to be had, or for a shape that
// no drive is asked in.
std::unique_ptr<Reader> make_reader(const ReaderChoice& choice, const ReadShape& shape,
                                    ReadSink& sink);

}  // namespace zipmoe
