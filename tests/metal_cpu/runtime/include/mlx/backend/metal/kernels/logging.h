#pragma once  // stands in for MLX's, whose methods are overloaded on address spaces
namespace mlx {
struct os_log {
  constexpr os_log(constant char*, constant char*) {}
  template <class... Args> void log_debug(constant char*, Args...) const {}
};
}  // namespace mlx
