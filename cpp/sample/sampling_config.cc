#include "sample/sampling_config.h"

#include <cmath>

namespace edge {
namespace {

Status check_number(const char* name, float found, float low, float high, bool low_excluded = false) {
  if (found <= high && (low_excluded ? found > low : found >= low)) return {};
  return error(Code::kBadArgument, "%s: expected a number in %c%g, %g], found %g", name, low_excluded ? '(' : '[',
               static_cast<double>(low), static_cast<double>(high), static_cast<double>(found));
}

Status check_integer(const char* name, int64_t found, int64_t low, int64_t high) {
  if (low <= found && found <= high) return {};
  return error(Code::kBadArgument, "%s: expected an integer in [%lld, %lld], found %lld", name,
               static_cast<long long>(low), static_cast<long long>(high), static_cast<long long>(found));
}

}  // namespace

Status SamplingConfig::validate(int64_t vocab_size) const {
  constexpr int64_t kMany = std::numeric_limits<int64_t>::max();
  EDGE_TRY(check_integer("vocab_size", vocab_size, 1, std::numeric_limits<int32_t>::max()));
  EDGE_TRY(check_number("temperature", temperature, 0, 100));
  EDGE_TRY(check_integer("top_k", top_k, 0, kMany));
  EDGE_TRY(check_number("typical_p", typical_p, 0, 1, true));
  EDGE_TRY(check_number("top_p", top_p, 0, 1, true));
  EDGE_TRY(check_number("min_p", min_p, 0, 1));
  EDGE_TRY(check_number("repetition_penalty", repetition_penalty, 0.01f, 100));
  EDGE_TRY(check_number("presence_penalty", presence_penalty, -100, 100));
  EDGE_TRY(check_number("frequency_penalty", frequency_penalty, -100, 100));
  EDGE_TRY(check_integer("penalty_last_n", penalty_last_n, -1, kMany));
  EDGE_TRY(check_integer("n_logprobs", n_logprobs, -1, 1024));
  for (const auto& [id, bias] : logit_bias) {
    EDGE_TRY(check_integer("logit_bias token", id, 0, vocab_size - 1));
    if (!(bias < std::numeric_limits<float>::infinity())) {
      return error(Code::kBadArgument, "logit_bias of token %d: expected a finite number or -inf, found %g", id,
                   static_cast<double>(bias));
    }
  }
  return {};
}

}  // namespace edge
