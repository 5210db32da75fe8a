// The definition of the neuron kernels (layouts and order of sums: neuron.h).
#include "kernels/gemv_table.h"
#include "kernels/half.h"
#include "kernels/neuron_act.h"
#include "kernels/neuron_table.h"

namespace edge {

EDGE_DECLARE_NEURON_TABLE(ref);
QuantizeQ8x32 quantize_q8x32_ref;

namespace {

const uint8_t* bytes_of(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }
float half_at(const uint8_t* p) { return half_to_float(load_as<uint16_t>(p)); }

float sum_lanes(const float (&a)[8]) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

// Weight of byte `at` = s*32 + lane*4 + b of a dot group's quants.
int dot_q8(const uint8_t* q, int at) { return static_cast<int>(q[at]) - 128; }
int dot_q4(const uint8_t* q, int at) { return (at < 128 ? q[at] & 15 : q[at - 128] >> 4) - 8; }

template <int64_t kGroupBytes, int (*kWeight)(const uint8_t*, int)>
float dot_integers(const uint8_t* row, int64_t n_groups, const std::byte* acts) {
  const auto* act = reinterpret_cast<const NeuronActGroup*>(acts);
  float acc[8] = {};
  for (int64_t g = 0; g < n_groups; ++g, row += kGroupBytes) {
    for (int lane = 0; lane < 8; ++lane) {
      int32_t sum = 0;
      for (int s = 0; s < 8; ++s) {
        for (int b = 0; b < 4; ++b) {
          const int at = s * 32 + lane * 4 + b;
          sum += kWeight(row + 16, at) * act[g].q[at];
        }
      }
      acc[lane] += (half_at(row + 2 * lane) * act[g].d[lane]) * static_cast<float>(sum);
    }
  }
  return sum_lanes(acc);
}

float dot_halves(const uint8_t* row, int64_t n_groups, const std::byte* acts) {
  const auto* x = reinterpret_cast<const float*>(acts);
  float acc[8] = {};
  for (int64_t i = 0; i < n_groups * kNeuronGroupValues; ++i) acc[i % 8] += half_at(row + 2 * i) * x[i];
  return sum_lanes(acc);
}

template <float (*kDot)(const uint8_t*, int64_t, const std::byte*)>
void dot(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts, int64_t act_stride,
         int64_t n_x, float* out, int64_t out_stride) {
  for (int64_t m = 0; m < n_x; ++m) {
    for (int64_t i = 0; i < n; ++i) {
      out[m * out_stride + i] = kDot(bytes_of(rows[i]), neuron_groups(hidden), acts + m * act_stride);
    }
  }
}

// What out[j] gains: group is the column's group, k the value's place in it.
float gain_q8(const uint8_t* group, int64_t k, float a) {
  return (a * half_at(group + k / 32 * 2)) * static_cast<float>(static_cast<int8_t>(group[16 + k]));
}
float gain_q4(const uint8_t* group, int64_t k, float a) {
  const uint8_t pair = group[16 + k / 32 * 16 + k % 16];
  return (a * half_at(group + k / 32 * 2)) * static_cast<float>((k % 32 < 16 ? pair & 15 : pair >> 4) - 8);
}
float gain_f16(const uint8_t* group, int64_t k, float a) { return a * half_at(group + 2 * k); }

template <int64_t kGroupBytes, float (*kGain)(const uint8_t*, int64_t, float)>
void axpy(const std::byte* const* cols, const float* a, int64_t n, int64_t begin, int64_t end, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    if (a[i] == 0.0f) continue;
    for (int64_t j = begin; j < end; ++j) {
      const uint8_t* group = bytes_of(cols[i]) + j / kNeuronGroupValues * kGroupBytes;
      out[j] += kGain(group, j % kNeuronGroupValues, a[i]);
    }
  }
}

}  // namespace

#define EDGE_NEURON_DOT_REF(format, definition)                                                                            \
  void neuron_dot_##format##_ref(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts,       \
                                 int64_t act_stride, int64_t n_x, float* out, int64_t out_stride) {                    \
    dot<definition>(rows, n, hidden, acts, act_stride, n_x, out, out_stride);                                          \
  }
EDGE_NEURON_DOT_REF(f16, dot_halves)
EDGE_NEURON_DOT_REF(q8, (dot_integers<272, dot_q8>))
EDGE_NEURON_DOT_REF(q4, (dot_integers<144, dot_q4>))

#define EDGE_NEURON_AXPY_REF(format, group_bytes)                                                                    \
  void neuron_axpy_##format##_ref(const std::byte* const* cols, const float* a, int64_t n, int64_t begin,        \
                                  int64_t end, float* out) {                                                     \
    axpy<group_bytes, gain_##format>(cols, a, n, begin, end, out);                                               \
  }
EDGE_NEURON_AXPY_REF(f16, 512)
EDGE_NEURON_AXPY_REF(q8, 272)
EDGE_NEURON_AXPY_REF(q4, 144)

void neuron_act_f16_ref(const float* x, int64_t hidden, std::byte* act) { neuron_act_f16(x, hidden, act); }
void neuron_act_q8_ref(const float* x, int64_t hidden, std::byte* act) {
  neuron_act_q8<quantize_q8x32_ref>(x, hidden, act);
}

}  // namespace edge
