// The module, and the core's errors as Python's. Everything in bindings*.cpp forwards to the core.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <optional>

#include "error.h"
#include "isa.h"

namespace nb = nanobind;

namespace {

template <class T>
nb::object to_python(const std::optional<T>& value) {
  return value ? nb::cast(*value) : nb::none();
}

void raise(const char* type, nb::object (*make)(nb::object, const std::exception&),
           const std::exception& error) {
  const nb::object kind = nb::module_::import_("zipmoe._errors").attr(type);
  PyErr_SetObject(kind.ptr(), make(kind, error).ptr());
}

nb::object make_corrupt(nb::object kind, const std::exception& error) {
  const auto& e = static_cast<const zipmoe::CorruptError&>(error);
  return kind(e.reason, nb::arg("file") = to_python(e.file),
              nb::arg("tensor") = to_python(e.tensor), nb::arg("layer") = to_python(e.layer),
              nb::arg("expert") = to_python(e.expert), nb::arg("plane") = to_python(e.plane),
              nb::arg("offset") = to_python(e.offset));
}

nb::object make_fetch(nb::object kind, const std::exception& error) {
  const auto& e = static_cast<const zipmoe::FetchError&>(error);
  return kind(e.what(), nb::arg("path") = e.path, nb::arg("offset") = e.offset,
              nb::arg("errno") = e.error_number);
}

nb::object make_format(nb::object kind, const std::exception& error) { return kind(error.what()); }

nb::object make_budget(nb::object kind, const std::exception& error) {
  const auto& e = static_cast<const zipmoe::BudgetError&>(error);
  return kind(e.what(), nb::arg("floor_bytes") = e.floor_bytes);
}

// Raises the Python namesake of a core error; others go on to nanobind's own translators.
void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const zipmoe::CorruptError& error) {
    raise("CorruptError", make_corrupt, error);
  } catch (const zipmoe::FetchError& error) {
    raise("FetchError", make_fetch, error);
  } catch (const zipmoe::FormatError& error) {
    raise("FormatError", make_format, error);
  } catch (const zipmoe::BudgetError& error) {
    raise("BudgetError", make_budget, error);
  }
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "zipmoe's native core";
  nb::register_exception_translator(translate);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (zipmoe::Isa isa : zipmoe::available_isas()) names.emplace_back(zipmoe::name(isa));
    return names;
  });
  zipmoe::bind_attention(m);
  zipmoe::bind_cache(m);
  zipmoe::bind_codec(m);
  zipmoe::bind_engine(m);
  zipmoe::bind_norm(m);
  zipmoe::bind_policy(m);
  zipmoe::bind_blocks(m);
}
