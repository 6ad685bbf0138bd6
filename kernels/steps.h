// Steps of grids in a byte, the upper one of a half without its sign: of held keys' channels, and
// the scales of values. 0 stands for 0; 0xf7 is the largest finite one.

#ifndef SHORT_STEPS
#define SHORT_STEPS
// The nearest step that eight bits hold; 0 for what is no number.
inline uchar short_step(float step) {
  const uint bits = uint(as_type<ushort>(half(step >= 0.0f ? step : 0.0f)));
  return uchar(min((bits + 64u) >> 7, 0xf7u));
}
inline float whole_step(uchar bits) { return float(as_type<half>(ushort(uint(bits) << 7))); }
#endif
