// What the kernels share: reading and coding single values of packed blocks.
//
// A block of `Size` keys of one kv head is stored as
//   masks    uint [Size - 1][W], W = ceil(D / 32): bit d % 32 of word d / 32 of row t - 1 says
//            that channel d changed at token t. Token 0 has no row: all of it is stored.
//   payload  a run of words with the values of token 0, then those that changed, token by token
//            and channel by channel; 32 / Bits to a word (2, 4, 8, 10, 16), lowest bits first.
//   grid     S [2][D], for codes: low and step of each channel. A code is low + code * step.
// mlx_delta/method/storage.py specifies it; S is half or bfloat16_t.

// The largest finite value: codes are clamped to it, since `step` is rounded up.
inline float largest_finite(half) { return 65504.0f; }
inline float largest_finite(bfloat16_t) { return 3.3895313892515355e38f; }

// Field `index` of a run of words, given the word it lies in.
template <int Bits>
inline uint packed_field(uint word, uint index) {
  constexpr uint per_word = 32 / Bits;
  return (word >> (Bits * (index % per_word))) & ((1u << Bits) - 1u);
}

// What a field stands for, in float.
template <typename S, int Bits>
inline float packed_value(uint field, float low, float step) {
  if (Bits == 16) {
    return float(as_type<S>(ushort(field)));
  }
  float value = low + float(field) * step;
  float largest = largest_finite(S(0));
  return float(S(value > largest ? largest : value));  // NaN passes
}

// Bits of the lanes before this one.
inline uint lanes_before(uint lane) { return (1u << lane) - 1u; }
