// What a dense feed-forward layer is given, and what its activation is applied to, for whoever watches a pass.
#pragma once

#include <cstdint>
#include <functional>

namespace edge {

struct FfnRows {
  int64_t layer;
  int64_t first_row;      // of the batch
  int64_t n_rows;
  const float* input;     // [n_rows][hidden_size padded to 16], after the norm
  const float* residual;  // [n_rows][hidden_size padded to 16], the stream that the layer's output is added to
  const float* gate;      // [n_rows][intermediate_size padded to 16], gate(x), or up(x) where there is no gate
};

using WatchFfn = std::function<void(const FfnRows&)>;

}  // namespace edge
