#include "kernels/tiles_neon.h"

namespace edge {

const TileTable& tile_table_neon() { return kTable; }

}  // namespace edge
