#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <stdexcept>
#include <utility>

#include "error.h"

namespace zipmoe {

ShardFile::ShardFile(std::string path, Buffering buffering) : path_(std::move(path)) {
  open_file(buffering != Buffering::always);
  if (direct_ && !takes_direct_reads()) {
    close(std::exchange(fd_, -1));
    open_file(false);
  }
  if (!direct_ && buffering == Buffering::never) {
    close(std::exchange(fd_, -1));
    throw std::invalid_argument(path_ + ": the filesystem takes no direct reads");
  }
  // Whole records are read in large requests: reading ahead would only fetch what nobody asked for.
  if (!direct_) (void)posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
}

ShardFile::ShardFile(ShardFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(other.size_),
      direct_(other.direct_) {}

ShardFile::~ShardFile() {
  if (fd_ >= 0) close(fd_);  // a file only read has nothing to lose here
}

void ShardFile::open_file(bool direct) {
  // Not to hang on a pipe that somebody put in the shard's place: O_NONBLOCK; regular files ignore
  // it.
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  direct_ = direct;
  fd_ = open(path_.c_str(), direct ? kFlags | O_DIRECT : kFlags);
  if (fd_ < 0 && direct && (errno == EINVAL || errno == EOPNOTSUPP)) {
    direct_ = false;
    fd_ = open(path_.c_str(), kFlags);
  }
  if (fd_ < 0 && errno == ELOOP) throw FormatError(path_ + ": a shard may not be a symbolic link");
  if (fd_ < 0) throw FetchError("cannot open the shard", path_, 0, errno);
  struct stat status{};
  if (fstat(fd_, &status) != 0) {
    const int error = errno;
    close(std::exchange(fd_, -1));
    throw FetchError("cannot ask for the size of the shard", path_, 0, error);
  }
  if (!S_ISREG(status.st_mode)) {
    close(std::exchange(fd_, -1));
    throw FormatError(path_ + ": a shard must be a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

// Some filesystems accept the flag and refuse the reads.
bool ShardFile::takes_direct_reads() const {
  alignas(kReadAlignment) std::array<std::byte, kReadAlignment> probe;
  return pread(fd_, probe.data(), probe.size(), 0) >= 0 || errno != EINVAL;
}

ReaderChoice reader_choice(std::string_view name) {
  ReaderChoice choice;
  std::string_view method = name;
  if (const auto plus = name.find('+'); plus != std::string_view::npos) {
    method = name.substr(0, plus);
    const std::string_view how = name.substr(plus + 1);
    if (how == "direct") {
      choice.buffering = Buffering::never;
    } else if (how == "buffered") {
      choice.buffering = Buffering::always;
    } else {
      method = "?";
    }
  }
  choice.uring = method.empty() || method == "io_uring";
  choice.pread = method.empty() || method == "pread";
  if (choice.uring || choice.pread) return choice;
  throw std::invalid_argument(
      "reader '" + std::string(name) +
      "' is unknown; io_uring and pread are known, alone or with +direct or "
      "+buffered, and the empty name chooses");
}

std::unique_ptr<Reader> make_reader(const ReaderChoice& choice, const ReadShape& shape,
                                    ReadSink& sink) {
  if (shape.depth > kMaxDepth || shape.request_bytes == 0 ||
      shape.request_bytes > kMaxRequestBytes || shape.request_bytes % kReadAlignment != 0)
    throw std::invalid_argument("requests of " + std::to_string(shape.request_bytes) + " bytes, " +
                                std::to_string(shape.depth) + " at once");
  if (choice.uring) {
    if (auto reader = make_uring_reader(shape, sink)) return reader;
    if (!choice.pread) {
      throw std::invalid_argument(
          "reader io_uring does not work here (built without liburing, or " +
          std::string("the system forbids it); use pread"));
    }
  }
  return make_pread_reader(shape, sink);
}

}  // namespace zipmoe
