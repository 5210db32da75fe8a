// The one place where the decoder's config crosses from Python.
#pragma once

#include <pybind11/pybind11.h>

#include "model/decoder_config.h"

namespace edge {

// Keys as in flashload.arch.DecoderConfig; raises ModelFileError for unknown names of norm, activation or qk_norm.
DecoderConfig decoder_config_from(const pybind11::dict& dict);

}  // namespace edge
