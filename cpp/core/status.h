// Errors as values: nothing that comes from outside may abort or throw inside the core.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace edge {

// One to one with flashload.errors.BY_CODE.
enum class Code {
  kOk,
  kBadFile,
  kCorrupt,
  kDiskError,
  kOverBudget,
  kUnsupported,
  kCancelled,
  kBadArgument,
  kContextOverflow,
};

const char* code_name(Code code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  // One line: what, where, expected, found.
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

// printf-style constructor, e.g. error(Code::kBadFile, "%s: expected %d, found %d", ...).
Status error(Code code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// A value or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}          // NOLINT: implicit by design
  Result(Status status) : status_(std::move(status)) {}  // NOLINT: implicit by design

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& operator*() { return *value_; }
  const T& operator*() const { return *value_; }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }
  T take() { return std::move(*value_); }

 private:
  std::optional<T> value_;
  Status status_;
};

#define EDGE_CONCAT_INNER(a, b) a##b
#define EDGE_CONCAT(a, b) EDGE_CONCAT_INNER(a, b)

// Returns the Status from the enclosing function when it is not ok.
#define EDGE_TRY(expression)                         \
  do {                                               \
    ::edge::Status edge_status = (expression);       \
    if (!edge_status.ok()) return edge_status;       \
  } while (false)

// EDGE_ASSIGN(auto x, make_x()): binds the value or returns the Status.
#define EDGE_ASSIGN(declaration, expression)                              \
  auto EDGE_CONCAT(edge_result_, __LINE__) = (expression);                \
  if (!EDGE_CONCAT(edge_result_, __LINE__).ok())                          \
    return EDGE_CONCAT(edge_result_, __LINE__).status();                  \
  declaration = EDGE_CONCAT(edge_result_, __LINE__).take()

}  // namespace edge
