// The typed errors of the core. bindings.cpp turns each into its namesake in zipmoe._errors.
#pragma once
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace zipmoe {

// Bytes of a store are not what they must be. Whoever knows more of the place than the thrower
// catches by reference, fills in the empty fields and throws on.
class CorruptError : public std::runtime_error {
 public:
  explicit CorruptError(std::string why) : std::runtime_error(why), reason(std::move(why)) {}
  CorruptError(std::string why, std::string which_plane) : CorruptError(std::move(why)) {
    plane = std::move(which_plane);
  }

  std::string reason;
  std::optional<std::string> file;
  std::optional<std::string> tensor;
  std::optional<std::int64_t> layer;
  std::optional<std::int64_t> expert;
  std::optional<std::string> plane;     // one of the names below
  std::optional<std::uint64_t> offset;  // bytes from the start of the file
};

inline constexpr const char* kSignMantissaPlane = "sign-mantissa";
inline constexpr const char* kExponentPlane = "exponent";
// Those of the integer codecs.
inline constexpr const char* kCodesPlane = "codes";
inline constexpr const char* kScalesPlane = "scales";

// The store is one that this zipmoe cannot read: an unknown codec, a shard that is no plain file.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The memory granted is below the least that works.
class BudgetError : public std::runtime_error {
 public:
  BudgetError(const std::string& message, std::uint64_t floor)
      : std::runtime_error(message), floor_bytes(floor) {}

  std::uint64_t floor_bytes;
};

// A read failed. `error_number` is errno, or 0 where the file simply ends too early.
class FetchError : public std::runtime_error {
 public:
  FetchError(const std::string& message, std::string path_, std::uint64_t offset_,
             int error_number_)
      : std::runtime_error(message),
        path(std::move(path_)),
        offset(offset_),
        error_number(error_number_) {}

  std::string path;
  std::uint64_t offset;
  int error_number;
};

}  // namespace zipmoe
