// A plain block of bytes that is neither zeroed nor copied without need.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

namespace zipmoe {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size) { resize(size); }

  std::uint8_t* data() { return bytes_.get(); }
  const std::uint8_t* data() const { return bytes_.get(); }
  std::size_t size() const { return size_; }
  std::span<const std::uint8_t> span() const { return {data(), size_}; }

  // Keeps the content; new bytes are not initialised.
  void resize(std::size_t size) {
    void* grown = std::realloc(bytes_.get(), size == 0 ? 1 : size);
    if (grown == nullptr) throw std::bad_alloc();
    (void)bytes_.release();
    bytes_.reset(static_cast<std::uint8_t*>(grown));
    size_ = size;
    if (size >= kHugeFrom) advise_huge_pages();
  }

 private:
  static constexpr std::size_t kHugeFrom = std::size_t{4} << 20;
  static constexpr std::uintptr_t kSmallPage = 4096;

  // Faulting in small pages one by one takes longer than encoding what goes there. Only advice: a
  // kernel that does not follow it changes nothing but the speed.
  void advise_huge_pages() {
    const auto begin =
        (reinterpret_cast<std::uintptr_t>(data()) + kSmallPage - 1) & ~(kSmallPage - 1);
    const auto end = (reinterpret_cast<std::uintptr_t>(data()) + size_) & ~(kSmallPage - 1);
    (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }

  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<std::uint8_t, Free> bytes_;
  std::size_t size_ = 0;
};

// Room for n values that begins at a multiple of 64 bytes, the content undefined.
template <class T>
T* aligned_room(Buffer& buffer, std::size_t n) {
  constexpr std::uintptr_t kLine = 64;
  if (buffer.size() < n * sizeof(T) + kLine) buffer.resize(n * sizeof(T) + kLine);
  const auto address = reinterpret_cast<std::uintptr_t>(buffer.data());
  return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
}

// Room for n values, the content undefined.
template <class T>
T* grown(Buffer& buffer, std::size_t n) {
  if (buffer.size() < n * sizeof(T)) buffer.resize(n * sizeof(T));
  return reinterpret_cast<T*>(buffer.data());
}

}  // namespace zipmoe
