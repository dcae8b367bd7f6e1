// The only file that knows Python. Everything here forwards to the core.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"

namespace nb = nanobind;

NB_MODULE(_core, m) {
  m.doc() = "zipmoe's native core";
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (zipmoe::Isa isa : zipmoe::available_isas()) names.emplace_back(zipmoe::name(isa));
    return names;
  });
}
