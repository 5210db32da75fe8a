#include "core/status.h"

#include <cstdarg>
#include <cstdio>

namespace edge {

const char* code_name(Code code) {
  switch (code) {
    case Code::kOk: return "ok";
    case Code::kBadFile: return "bad_file";
    case Code::kCorrupt: return "corrupt";
    case Code::kDiskError: return "disk_error";
    case Code::kOverBudget: return "over_budget";
    case Code::kUnsupported: return "unsupported";
    case Code::kCancelled: return "cancelled";
    case Code::kBadArgument: return "bad_argument";
    case Code::kContextOverflow: return "context_overflow";
  }
  return "unknown";
}

Status error(Code code, const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return Status(code, buffer);
}

}  // namespace edge
