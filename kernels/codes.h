// Codes of 2 to 8 bits, and how they become floats with few instructions.
//
// A word of one width holds 32 / Width codes, lowest bits first. They are taken out in pairs: of the word,
// shifted so that one code lies in the lower ten bits of each half, the rest is masked away, and
// the bits of 512 as a half are put in front. That makes two halves 512 + code * unit with an
// `and` and an `or`, and a half as an operand costs nothing on Apple's GPUs, where conversions from
// integers and shifts are slow. Whoever multiplies with such a field divides its factor by the unit
// once, and takes off 512 times the factor: of a whole block or a whole text, not of each code.
// Fields lie as high in the ten bits as two or three shifts a word allow, so that 512 is not much
// more than the largest code times its unit, and little is lost when it is taken off.
//
// With `Bytes`, codes of 4 bits go byte by byte into the upper bits of a float's mantissa instead:
// 512 + 4 * code, one instruction each where a GPU can pick bytes (NVIDIA's `prmt`).

#ifndef UNROLL_ALL
#define UNROLL_ALL _Pragma("clang loop unroll(full)")
#endif
#ifndef UNROLL_NONE
#define UNROLL_NONE _Pragma("clang loop unroll(disable)")
#endif
// How far a run of 16 bytes must be aligned to be one load. Apple's GPUs ask for that of its
// elements, which is what a slice of an array has.
#ifndef WIDE_LOAD
#define WIDE_LOAD
#endif

template <typename Element, int N>
struct WIDE_LOAD Run {
  Element e[N];
};

template <int Width>
constexpr int codes_per_word() {
  return 32 / Width;
}

// Pairs are codes p and p + pairs.
template <int Width>
constexpr int code_pairs() {
  return (32 / Width + 1) / 2;
}

// How far left a word is shifted for pair p (negative: right).
template <int Width>
constexpr int pair_shift(int p) {
  return Width == 8 ? -8 * p
      : Width == 6  ? -6 * p
      : Width == 5  ? 5 - 5 * p
      : Width == 4  ? (p < 2 ? 2 : -6)
      : Width == 3  ? (p < 2 ? 3 : p < 4 ? -3 : -6)
                    : (p < 3 ? 4 : p < 6 ? -2 : -8);
}

// Where the code of the lower half then lies, and that of the upper half.
template <int Width>
constexpr int low_bit(int p) {
  return Width * p + pair_shift<Width>(p);
}
template <int Width>
constexpr int high_bit(int p) {
  return Width * (p + code_pairs<Width>()) + pair_shift<Width>(p) - 16;
}

template <int Width>
constexpr bool has_high(int p) {
  return p + code_pairs<Width>() < codes_per_word<Width>();
}

#ifndef SELECT_BYTES
// Four of the eight bytes of x and y, whose numbers are the digits of `digits`.
inline uint select_bytes(uint x, uint y, uint digits) {
  uint result = 0;
  for (uint i = 0; i < 4; ++i) {
    uint digit = (digits >> (4 * i)) & 7u;
    uint byte = ((digit < 4 ? x : y) >> (8 * (digit & 3u))) & 0xffu;
    result |= byte << (8 * i);
  }
  return result;
}
#endif

constant constexpr float CODE_ZERO = 512.0f;  // what a field is for code 0

// The unit of field k, as an exponent.
template <int Width, bool Bytes>
constexpr int code_unit(int k) {
  return Bytes && Width == 4    ? 2
      : k < code_pairs<Width>() ? low_bit<Width>(k) - 1
                                : high_bit<Width>(k - code_pairs<Width>()) - 1;
}

// Fields p and p + code_pairs<Width>() of a word. Where there is no second one, it is anything
// finite.
template <int Width, bool Bytes>
inline float2 code_pair(uint word, int p) {
  if (Bytes && Width == 4) {
    const uint x = (p & 1 ? word >> 4 : word) & 0x0f0f0f0fu;
    const uint digits = 0x4055u | (uint(p / 2) << 8);
    return float2(
        as_type<float>(select_bytes(x, 0x44u, digits)),
        as_type<float>(select_bytes(x, 0x44u, digits + 0x200u)));
  }
  const int shift = pair_shift<Width>(p);
  const uint shifted = shift > 0 ? word << (shift & 31) : word >> (-shift & 31);
  const uint field = (1u << Width) - 1u;
  const uint upper = has_high<Width>(p) ? field << (high_bit<Width>(p) + 16) : 0u;
  const uint bits = (shifted & (field << low_bit<Width>(p) | upper)) | 0x60006000u;
  const half2 pair = as_type<half2>(bits);
  return float2(float(pair.x), float(pair.y));
}

// 2 to the power of a small whole number.
inline float power_of_two(int exponent) { return as_type<float>(uint(exponent + 127) << 23); }

// --- keys: halves of words, which 2, 3, 4, 5, 6 or 8 codes fill ----------------------------------

// Code p of a half word that `Kind` codes fill: its bits, and its lowest bit.
template <int Kind>
constexpr int field_width(int p) {
  return Kind == 2 ? 8
      : Kind == 3  ? (p < 2 ? 5 : 6)
      : Kind == 4  ? 4
      : Kind == 5  ? (p < 4 ? 3 : 4)
      : Kind == 6  ? (p < 2 ? 2 : 3)
                   : 2;
}
template <int Kind>
constexpr int field_bit(int p) {
  return Kind == 2 ? 8 * p
      : Kind == 3  ? 5 * p
      : Kind == 4  ? 4 * p
      : Kind == 5  ? 3 * p
      : Kind == 6  ? (p < 2 ? 2 * p : 3 * p - 2)
                   : 2 * p;
}

// How far left a word is shifted for it (negative: right), the same for both halves.
template <int Kind>
constexpr int field_shift(int p) {
  return Kind == 4                                      ? (p < 2 ? 2 : -6)
      : field_bit<Kind>(p) + field_width<Kind>(p) <= 10 ? 0
      : Kind == 2                                       ? -8
                                                        : -6;
}

// The unit of its field, as an exponent.
template <int Kind, bool Bytes>
constexpr int field_unit(int p) {
  return Bytes && Kind == 4 ? 2 : field_bit<Kind>(p) + field_shift<Kind>(p) - 1;
}

// Field p of both halves of a word.
template <int Kind, bool Bytes>
inline float2 field_pair(uint word, int p) {
  if (Kind == 4) {
    return code_pair<4, Bytes>(word, p);
  }
  const int shift = field_shift<Kind>(p);
  const uint shifted = shift < 0 ? word >> (-shift & 31) : word;
  const uint field = ((1u << field_width<Kind>(p)) - 1u) << (field_bit<Kind>(p) + shift);
  const half2 pair = as_type<half2>((shifted & (field | field << 16)) | 0x60006000u);
  return float2(float(pair.x), float(pair.y));
}

// --- a token's value (V): codes without gaps, of which a lane has eight --------------------------

// Eight codes of a value as one or two words: eight codes of 2, 3 or 4 bits, or twice four of 5, 6
// or 8.
template <int Width>
constexpr int value_pieces() {
  return Width > 4 ? 2 : 1;
}

struct Pieces {
  uint word[2];
};

// Codes 8 * own to 8 * own + 7 of a row of words; nothing behind the row's last word is read.
template <int Width>
inline Pieces load_codes(const device uint* row, int own) {
  const int bit = 8 * Width * own;
  const device uint* from = row + bit / 32;
  Pieces read;
  read.word[0] = from[0];
  if (Width == 8) {
    read.word[1] = from[1];
  } else if (Width == 6 || Width == 5 || Width == 3) {
    // The last lane's codes may end with the first word.
    read.word[1] = from[bit % 32 + 8 * Width > 32 ? 1 : 0];
  } else {
    read.word[1] = 0u;
  }
  return read;
}

// The words that were loaded, shifted so that each begins with this lane's codes.
template <int Width>
inline Pieces align_codes(Pieces read, int own) {
  const uint shift = uint(8 * Width * own) % 32;
  if (Width == 2) {
    const uint codes = (read.word[0] >> shift) & 0xffffu;
    read.word[0] = codes | (codes << 8);  // codes 4 to 7 to where a word has 8 to 11
  }
  if (Width == 6 || Width == 5 || Width == 3) {
    const uint low = (read.word[0] >> shift) | ((read.word[1] << 1) << (31 - shift));
    const uint high = read.word[1] >> shift;
    constexpr int four = (4 * Width) & 31;  // bits of a piece
    read.word[0] = low;
    read.word[1] = (low >> four) | (high << (32 - four));
  }
  return read;
}

// The number within its piece of the second code of pair p of a value; 8 or more: there is none.
template <int Width>
constexpr int second_of_pair(int p) {
  return Width == 2 ? p + 4 : p + code_pairs<Width>();
}

// The unit of a value's code k of 8, as an exponent.
template <int Width, bool Bytes>
inline int value_unit(int k) {
  const int c = k % (8 / value_pieces<Width>());
  return code_unit<Width, Bytes>(Width == 2 && c >= 4 ? c + 4 : c);
}
