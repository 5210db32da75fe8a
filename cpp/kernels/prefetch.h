// Asks for the cache line at p. Internal linkage: this header is compiled under several ISA flags.
#pragma once

namespace edge {
namespace {

// GCC takes a function that only prefetches for one without effects, and drops calls it has not yet inlined when it finds
// that out. The empty assembly is an effect that costs nothing.
[[maybe_unused]] inline void prefetch_line(const void* p) {
  __builtin_prefetch(p);
  __asm__ volatile("" ::);
}

}  // namespace
}  // namespace edge
