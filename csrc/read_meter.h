// How fast a drive gives whole records from anywhere in a file, as the expert cache asks for them.
#pragma once
#include <cstddef>
#include <string>

#include "reader.h"

namespace zipmoe {

// Bytes a second. Keeps a few records of `record_bytes` (rounded up to kReadAlignment) under way
// for about `seconds`. Throws FetchError where a read fails, std::invalid_argument where the file
// is shorter than a record.
double measure_reads(const std::string& path, const ReaderChoice& choice, const ReadShape& shape,
                     std::size_t record_bytes, double seconds);

}  // namespace zipmoe
