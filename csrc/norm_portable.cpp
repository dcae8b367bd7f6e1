// Norms for any processor.
#include "norm_pointwise.h"

namespace zipmoe {

const NormRow kPortableNorm = norm_values;

}  // namespace zipmoe
