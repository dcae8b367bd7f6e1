// The memory of the expert cache: one stretch, asked for once, given back once.
#pragma once
#include <cstddef>
#include <span>

namespace zipmoe {

// Anonymous memory that begins at a multiple of 2 MiB and asks for huge pages. Decoding walks
// through megabytes at memory speed, and with pages of 4 KiB a good part of that time would go to
// the TLB.
//
// What is touched, and not before, takes memory, and not a page more (a huge page is used only
// where it lies wholly inside the stretch).
//
// A forked child does not inherit it (MADV_DONTFORK): copy on write would otherwise move pages from
// under a running direct read.
class Arena {
 public:
  Arena() = default;
  // Throws std::bad_alloc where the system refuses.
  explicit Arena(std::size_t bytes);
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  [[nodiscard]] std::span<std::byte> at(std::size_t offset, std::size_t length) const {
    return bytes_.subspan(offset, length);
  }
  // Has the memory of a part ready. A direct read into a page that is not there yet waits
  // for it while the drive has nothing to do; on a virtual machine, whose host may have taken free
  // memory back, that made cold prompts several times slower than the drive.
  void touch(std::size_t offset, std::size_t length);
  // The system takes the memory of a part back; it reads as zeros, and costs memory again from its
  // next use on. Not for memory that a ring has registered: that would stay, and be another's.
  void give_back(std::size_t offset, std::size_t length) noexcept;

 private:
  void release() noexcept;

  std::span<std::byte> bytes_;
};

}  // namespace zipmoe
