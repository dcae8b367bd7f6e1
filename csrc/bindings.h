// What the files named bindings_*.cpp add to the module. Only files named bindings* know Python.
#pragma once
#include <nanobind/nanobind.h>

namespace zipmoe {

void bind_attention(nanobind::module_& m);
void bind_blocks(nanobind::module_& m);
void bind_cache(nanobind::module_& m);
void bind_codec(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_norm(nanobind::module_& m);
void bind_policy(nanobind::module_& m);

}  // namespace zipmoe
