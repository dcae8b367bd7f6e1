// Norms for Python. As in bindings_engine.cpp, tensors come as addresses: zipmoe.norm has checked
// dtypes and shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "bindings.h"
#include "norm.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

Isa engaged(const std::string& wanted) {
  static const Isa best = best_isa();
  return wanted.empty() ? best : isa_from_name(wanted);
}

}  // namespace

void bind_norm(nb::module_& m) {
  nb::enum_<NormKind>(m, "NormKind")
      .value("plain", NormKind::plain)
      .value("rounded", NormKind::rounded)
      .value("wide", NormKind::wide)
      .value("wide_plus1", NormKind::wide_plus1);
  m.def(
      "rms_norm",
      [](std::uintptr_t x, std::uint64_t rows, std::uint32_t width, std::uintptr_t weight,
         bool weight_is_wide, std::uintptr_t out, NormKind kind, float eps,
         const std::string& isa) {
        const NormRule rule{
            kind, eps, width,
            weight_is_wide ? nullptr : reinterpret_cast<const std::uint16_t*>(weight),
            weight_is_wide ? reinterpret_cast<const float*>(weight) : nullptr};
        nb::gil_scoped_release release;
        rms_norm(reinterpret_cast<const std::uint16_t*>(x), rows, rule,
                 reinterpret_cast<std::uint16_t*>(out), engaged(isa), *shared_pool());
      },
      "x"_a, "rows"_a, "width"_a, "weight"_a, "weight_is_wide"_a, "out"_a, nb::kw_only(), "kind"_a,
      "eps"_a, "isa"_a = "");
}

}  // namespace zipmoe
