#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace zipmoe {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kTouchers = 4;
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

// munmap of a stretch that we mapped cannot fail but for a fault of ours; nothing could be done
// then.
void unmap(std::byte* begin, std::size_t length) noexcept {
  if (length > 0) munmap(begin, length);
}

}  // namespace

Arena::Arena(std::size_t bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX - kHugePage) throw std::bad_alloc();
  const std::size_t mapped = bytes + kHugePage;
  void* address = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();

  auto* begin = static_cast<std::byte*>(address);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(begin) % kHugePage;
  const std::size_t head = past == 0 ? 0 : kHugePage - past;
  unmap(begin, head);
  unmap(begin + head + bytes, mapped - head - bytes);
  bytes_ = {begin + head, bytes};
  // Advice: a kernel without huge pages refuses it, and everything works all the same.
  (void)madvise(bytes_.data(), bytes, MADV_HUGEPAGE);
  (void)madvise(bytes_.data(), bytes, MADV_DONTFORK);
}

// Several threads, whatever the number of cores: where the machine is a virtual one, a page may
// have to come from its host, and what is waited for then is not a core of ours.
void Arena::touch(std::size_t offset, std::size_t length) {
  const std::size_t part = (length / kTouchers + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  std::vector<std::jthread> threads;
  for (std::size_t at = 0; at < length; at += part)
    threads.emplace_back([stretch = this->at(offset + at, std::min(part, length - at))] {
      // Older kernels refuse; then pages come one by one, as they are read into.
      (void)madvise(stretch.data(), stretch.size(), MADV_POPULATE_WRITE);
    });
}

void Arena::give_back(std::size_t offset, std::size_t length) noexcept {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t begin = (offset + page - 1) / page * page;
  const std::size_t end = (offset + length) / page * page;
  // Refused where the process locks its memory (mlockall): then it was not to be given back.
  if (begin < end) (void)madvise(bytes_.data() + begin, end - begin, MADV_DONTNEED);
}

Arena::Arena(Arena&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  if (this != &other) {
    release();
    bytes_ = std::exchange(other.bytes_, {});
  }
  return *this;
}

Arena::~Arena() { release(); }

void Arena::release() noexcept {
  unmap(bytes_.data(), bytes_.size());
  bytes_ = {};
}

}  // namespace zipmoe
