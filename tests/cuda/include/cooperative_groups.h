// In the place of CUDA's header of this name, which MLX includes: no kernel uses it, and it is long.
#pragma once
namespace cooperative_groups {}
