#include "kernels/amx_model.h"

#include <cstring>

namespace edge {
namespace {

struct State {
  bool configured = false;
  AmxConfig config;
  uint8_t tile[kAmxTiles][kAmxRows][kAmxRowBytes] = {};
  const char* fault = "";
};

thread_local State state;

// False, and remembered as this thread's first fault, when a CPU would refuse.
bool allowed(bool holds, const char* what) {
  if (!holds && state.fault[0] == '\0') state.fault = what;
  return holds;
}

bool usable(int tile) {
  return allowed(state.configured, "#UD: tiles are not configured") &&
         allowed(tile >= 0 && tile < kAmxTiles && state.config.rows[tile] != 0 && state.config.colsb[tile] != 0,
                 "#UD: a tile that is not configured");
}

// Row `row` becomes n bytes of `from` and zeros (write_row_and_zero).
void write_row(int tile, int row, const void* from, int n) {
  std::memcpy(state.tile[tile][row], from, static_cast<size_t>(n));
  std::memset(state.tile[tile][row] + n, 0, static_cast<size_t>(kAmxRowBytes - n));
}

void zero_upper_rows(int tile, int first) {
  for (int row = first; row < kAmxRows; ++row) std::memset(state.tile[tile][row], 0, kAmxRowBytes);
}

bool legal(const AmxConfig& config) {
  bool ok = allowed(config.palette == 1, "#GP: an unknown palette");
  for (const uint8_t byte : config.reserved) ok = ok && allowed(byte == 0, "#GP: a reserved byte is not zero");
  for (int t = 0; ok && t < 16; ++t) {
    const int rows = config.rows[t], colsb = config.colsb[t];
    ok = allowed(t < kAmxTiles || (rows == 0 && colsb == 0), "#GP: more than eight tiles") &&
         allowed(rows <= kAmxRows && colsb <= kAmxRowBytes, "#GP: a tile is too large") &&
         allowed((rows == 0) == (colsb == 0), "#GP: rows without bytes, or bytes without rows");
  }
  return ok;
}

// Four products of signed bytes.
uint32_t dot4(const uint8_t* left, const uint8_t* right) {
  int32_t sum = 0;
  for (int b = 0; b < 4; ++b) sum += static_cast<int8_t>(left[b]) * static_cast<int8_t>(right[b]);
  return static_cast<uint32_t>(sum);
}

}  // namespace

void AmxModel::configure(const AmxConfig& config) {
  AmxModel::release();
  if (config.palette == 0 || !legal(config)) return;
  state.configured = true;
  state.config = config;
}

void AmxModel::release() {
  state.configured = false;
  std::memset(state.tile, 0, sizeof state.tile);
}

void AmxModel::zero(int tile) {
  if (usable(tile)) zero_upper_rows(tile, 0);
}

void AmxModel::load(int tile, const void* rows, int64_t stride) {
  if (!usable(tile)) return;
  const auto* from = static_cast<const uint8_t*>(rows);
  for (int row = state.config.start_row; row < state.config.rows[tile]; ++row) {
    write_row(tile, row, from + row * stride, state.config.colsb[tile]);
  }
  zero_upper_rows(tile, state.config.rows[tile]);
  state.config.start_row = 0;
}

void AmxModel::store(int tile, void* rows, int64_t stride) {
  if (!usable(tile)) return;
  auto* to = static_cast<uint8_t*>(rows);
  for (int row = state.config.start_row; row < state.config.rows[tile]; ++row) {
    std::memcpy(to + row * stride, state.tile[tile][row], state.config.colsb[tile]);
  }
  state.config.start_row = 0;
}

void AmxModel::multiply_add(int sum, int left, int right) {
  if (!usable(sum) || !usable(left) || !usable(right)) return;
  const uint8_t* rows = state.config.rows;
  const uint16_t* colsb = state.config.colsb;
  if (!allowed(sum != left && sum != right && left != right, "#UD: one tile is two operands") ||
      !allowed(colsb[sum] % 4 == 0 && colsb[left] % 4 == 0, "#UD: a row is no whole number of dwords") ||
      !allowed(rows[sum] == rows[left] && colsb[sum] == colsb[right] && colsb[left] == 4 * rows[right],
               "#UD: the tiles' shapes do not fit") ||
      !allowed(state.config.start_row == 0, "#UD: a product after a load that was cut off")) {
    return;
  }
  for (int m = 0; m < rows[sum]; ++m) {
    uint32_t tmp[kAmxRowBytes / 4];  // sums wrap
    std::memcpy(tmp, state.tile[sum][m], sizeof tmp);
    for (int k = 0; k < colsb[left] / 4; ++k) {
      for (int n = 0; n < colsb[sum] / 4; ++n) {
        tmp[n] += dot4(state.tile[left][m] + 4 * k, state.tile[right][k] + 4 * n);
      }
    }
    write_row(sum, m, tmp, colsb[sum]);
  }
  zero_upper_rows(sum, rows[sum]);
}

const char* AmxModel::fault() {
  const char* first = state.fault;
  state.fault = "";
  return first;
}

}  // namespace edge
