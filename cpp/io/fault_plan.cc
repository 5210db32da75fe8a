#include "io/fault_plan.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <string_view>
#include <thread>

namespace edge {
namespace {
constexpr int64_t kPage = 4096, kInsideBlock = 100;
constexpr uint64_t kMaxDelayMs = 10'000;

// Parses a number off the front of `text`.
bool take_number(std::string_view* text, uint64_t* value) {
  const auto [end, code] = std::from_chars(text->data(), text->data() + text->size(), *value);
  if (code != std::errc()) return false;
  text->remove_prefix(static_cast<size_t>(end - text->data()));
  return true;
}
}  // namespace

Result<FaultPlan> FaultPlan::parse(const std::string& text) {
  static constexpr std::pair<std::string_view, Kind> kKinds[] = {
      {"eio", Kind::kEio},   {"enospc", Kind::kNoSpace}, {"again", Kind::kAgain}, {"short", Kind::kShort},
      {"zero", Kind::kZero}, {"flip", Kind::kFlip},      {"delay", Kind::kDelay},
  };
  FaultPlan plan;
  std::string_view rest = text;
  while (!rest.empty()) {
    std::string_view item = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), item.size() + 1));
    const std::string_view whole = item;
    const auto bad = [&] {
      return error(Code::kBadArgument, "fault plan: expected kind@n[+][:argument], found \"%.*s\"",
                   static_cast<int>(whole.size()), whole.data());
    };
    const size_t at = item.find('@');
    if (at == std::string_view::npos) return bad();
    Fault fault;
    const auto* kind = std::find_if(std::begin(kKinds), std::end(kKinds),
                                    [&](const auto& known) { return known.first == item.substr(0, at); });
    if (kind == std::end(kKinds)) return bad();
    fault.kind = kind->second;
    item.remove_prefix(at + 1);
    if (!take_number(&item, &fault.at)) return bad();
    if (item.starts_with('+')) {
      fault.forever = true;
      item.remove_prefix(1);
    }
    if (item.starts_with(':')) {
      item.remove_prefix(1);
      if (!take_number(&item, &fault.argument)) return bad();
    }
    if (!item.empty()) return bad();
    plan.faults_.push_back(fault);
  }
  return plan;
}

int64_t FaultPlan::apply(uint64_t read_index, int64_t result, std::byte* data) const {
  for (const Fault& fault : faults_) {
    if (read_index != fault.at && !(fault.forever && read_index > fault.at)) continue;
    switch (fault.kind) {
      case Kind::kEio: result = -EIO; break;
      case Kind::kNoSpace: result = -ENOSPC; break;
      case Kind::kAgain: result = -EAGAIN; break;
      case Kind::kShort:
        // What ends inside its first block cannot be read on.
        if (result > 0) result = result >= 2 * kPage ? result / 2 / kPage * kPage : std::min(result / 2, kInsideBlock);
        break;
      case Kind::kZero: result = 0; break;
      case Kind::kFlip:
        if (result > 0 && data != nullptr) {
          const uint64_t bit = fault.argument % (static_cast<uint64_t>(result) * 8);
          data[bit / 8] ^= std::byte{1} << (bit % 8);
        }
        break;
      case Kind::kDelay:
        std::this_thread::sleep_for(std::chrono::milliseconds(std::min(fault.argument, kMaxDelayMs)));
        break;
    }
  }
  return result;
}

}  // namespace edge
