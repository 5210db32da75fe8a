#include "kernels/tiles_neon.h"

namespace edge {

const TileTable& tile_table_neon_dotprod() { return kTable; }

}  // namespace edge
