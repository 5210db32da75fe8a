// Rows of the batch in flight: whose they are, where they stand, whom they see.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "kv/kv_cache.h"

namespace edge {

// The text of a row, and where in its cache the row is staged.
struct RowHome {
  KvCache* kv = nullptr;
  int64_t first_row = 0;  // of the text's part of the batch
  int64_t slot(int64_t row) const { return kv->n_committed() + row - first_row; }
};

struct BatchRows {
  int64_t n_rows = 0;
  const RowHome* homes = nullptr;       // per row
  const int64_t* positions = nullptr;   // per row
  const uint64_t* visible = nullptr;    // [n_rows][mask_words]: rows that row i sees, itself included
  int64_t mask_words = 0;

  // fn(other) for every row that `row` sees, in the order of their positions.
  template <typename Fn>
  void for_visible(int64_t row, Fn&& fn) const {
    for (int64_t word = 0; word < mask_words; ++word) {
      for (uint64_t bits = visible[row * mask_words + word]; bits != 0; bits &= bits - 1) {
        fn(word * 64 + std::countr_zero(bits));
      }
    }
  }
};

}  // namespace edge
