// A sequence on disk: its tokens and committed keys and values, restored bit for bit under the model that made them.
//
// Little-endian: a header of 4096 bytes, the tokens (i32, then their xxh3), then for every 16 tokens, every layer, keys and
// values: [16][kv_dim] f16 (of other types a tile per head) and the xxh3 of those bytes plus their index, so that none takes another's place.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"
#include "kv/kv_cache.h"

namespace edge {

struct SessionModel {
  uint64_t digest = 0;      // PackDirectory::digest()
  int64_t vocab_size = 0;
  int64_t context = 0;      // tokens
};

// `path` appears whole or not at all. kDiskError, kCorrupt (pages on a drive), kCancelled when `interrupted` says so.
Status save_session(const std::string& path, const SessionModel& model, std::span<const int32_t> tokens, KvCache& kv,
                    const std::function<bool()>& interrupted);

// Returns the tokens; `kv` then holds what was committed of them, and nothing on error. kBadFile: no session, or cut short;
// kCorrupt: damaged; kUnsupported: another model's or version's; kContextOverflow: longer than this context.
Result<std::vector<int32_t>> load_session(const std::string& path, const SessionModel& model, KvCache& kv,
                                          const std::function<bool()>& interrupted);

}  // namespace edge
