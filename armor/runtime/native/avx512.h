/* AVX-512 primitives: 16 fp32 lanes. bf16 weights become fp32 on the way in, or, with BF16_PRODUCTS, stay pairs that
 * vdpbf16ps multiplies into fp32 sums. Processors: Skylake-X and later; with BF16_PRODUCTS Zen 4, Sapphire
 * Rapids and later. */
#ifdef BF16_PRODUCTS
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vbmi2,popcnt,bmi2"
#else
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,popcnt,bmi2"
#endif
#include "target.h"

typedef __m512 vec;

static inline vec zero(void) { return _mm512_setzero_ps(); }
static inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline float sum(vec v) { return _mm512_reduce_add_ps(v); }
/* The sum of the quarters: four floats. */
static inline void store_four(float *to, vec v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline void sum_four(float to[4], vec a, vec b, vec c, vec d) {
    const vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    store_four(to, add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)));
}
static inline vec load_vec(const void *p) { return _mm512_loadu_ps(p); }
static inline void store_vec(void *p, vec v) { _mm512_storeu_ps(p, v); }
static inline __mmask16 first16(int64_t n) { return (__mmask16)_bzhi_u32(0xffff, (uint32_t)n); }

static inline vec load_f32(const float *p, int64_t n) {
    return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first16(n), p);
}
static inline void store_f32(float *p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, first16(n), v); }

static inline vec widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
static inline vec load_bf16(const uint16_t *p, int64_t n) {
    return widen(n >= 16 ? _mm256_loadu_si256((const void *)p) : _mm256_maskz_loadu_epi16(first16(n), p));
}
/* To the nearest, ties to even; NaN stays NaN. */
static inline __m256i narrow(vec v) {
#ifdef BF16_PRODUCTS
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
static inline void store_bf16(uint16_t *p, vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first16(n), narrow(v)); }

static inline vec fused(vec s, vec a, vec b) { return _mm512_fmadd_ps(a, b, s); }
static inline __m512 sixteen(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
#ifndef BF16_PRODUCTS
/* 2 n int4 in the low n <= 8 bytes, the first in the lowest four bits, as 16 bytes. */
static inline __m128i nibbles(__m128i packed) {
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i halves =
        _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(_mm_srli_epi16(packed, 4), low));
    return _mm_sub_epi8(_mm_xor_si128(halves, eight), eight);
}
#endif

static inline void transpose(vec v[16]) {
    vec t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#define LANES 16
#define TILE 8
#define DOT_ROWS 8

#ifdef BF16_PRODUCTS

#define UNIT 2
#define NAME(f) f##_avx512bf16_bf16
typedef uint16_t weight;
typedef uint16_t element;

static inline __mmask32 first32(int64_t n) { return (__mmask32)_bzhi_u32(0xffffffff, (uint32_t)n); }
static inline vec words(__m512i v) { return _mm512_castsi512_ps(v); }

static inline vec load(const weight *p, int64_t n) {
    return words(n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first32(n), p));
}
static inline vec load_element(const element *p, int64_t n) { return load(p, n); }
static inline vec load_packed(const weight *p, int64_t n) { return load(p, n); }
static inline vec load_half(const weight *p) {
    return words(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)p)));
}
/* An integer of a byte is exact in bf16. */
static inline vec bytes_to_units(__m256i bytes) {
    return (vec)_mm512_cvtne2ps_pbh(sixteen(_mm256_extracti128_si256(bytes, 1)), sixteen(_mm256_castsi256_si128(bytes)));
}
static inline vec bytes_to_half(__m128i bytes) {
    return words(_mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(sixteen(bytes))));
}
static inline vec load_int8(const void *p, int64_t n) {
    if (n >= 32) /* the halves apart, which widen on the way in */
        return (vec)_mm512_cvtne2ps_pbh(sixteen(_mm_loadu_si128((const __m128i *)p + 1)), sixteen(_mm_loadu_si128(p)));
    return bytes_to_units(_mm256_maskz_loadu_epi8(first32(n), p));
}
static inline vec load_half_int8(const void *p) { return bytes_to_half(_mm_loadu_si128(p)); }
/* 32 int4 as units: 16 in each of the lowest four and the highest four quadwords, the first in the lowest four bits. One
 * shift brings each into the low bits of its half lane, and a table has its bf16. vpermw reads five bits there: the
 * fifth is the next number's, so the table stands there twice. */
static inline vec nibbles_to_units(__m512i packed) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, (int16_t)0xc100, (int16_t)0xc0e0,
        (int16_t)0xc0c0, (int16_t)0xc0a0, (int16_t)0xc080, (int16_t)0xc040, (int16_t)0xc000, (int16_t)0xbf80));
    const __m512i shifts =
        _mm512_setr_epi64(0x000c000800040000, 0x001c001800140010, 0x002c002800240020, 0x003c003800340030,
                          0x000c000800040000, 0x001c001800140010, 0x002c002800240020, 0x003c003800340030);
    return words(_mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, packed), table));
}
/* Broadcasts that only load, where a permutation would compete with what follows. */
static inline __m512i halves(__m128i low, __m128i high) {
    return _mm512_mask_broadcastq_epi64(_mm512_broadcastq_epi64(low), 0xf0, high);
}
static inline vec load_int4(const void *p, int64_t n) {
    if (n >= 32) return nibbles_to_units(halves(_mm_loadl_epi64(p), _mm_loadl_epi64((const __m128i *)((const char *)p + 8))));
    __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)first32((n + 1) / 2), p);
    return nibbles_to_units(halves(bytes, _mm_srli_si128(bytes, 8)));
}
static inline vec load_half_int4(const void *p) {
    return nibbles_to_units(_mm512_broadcastq_epi64(_mm_loadl_epi64(p))); /* the upper half twice the lower: any */
}
/* 32 floats of e4m3 as units. Where the exponent is 0 a table has the eight sizes. */
static inline vec fp8_to_units(__m256i bytes) {
    const __m512i small = _mm512_castsi128_si512(
        _mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60)); /* of size times 2^-9 */
    const __m512i wide = _mm512_cvtepu8_epi16(bytes), size = _mm512_and_si512(wide, _mm512_set1_epi16(127));
    const __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 is_small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
    const __m512i number = _mm512_mask_permutexvar_epi16(bits, is_small, size, small);
    const __m512i high = _mm512_slli_epi16(wide, 8), sign = _mm512_set1_epi16((int16_t)0x8000);
    return words(_mm512_ternarylogic_epi32(number, high, sign, 0xf8)); /* number | (high & sign) */
}
static inline vec load_fp8(const void *p, int64_t n) {
    return fp8_to_units(n >= 32 ? _mm256_loadu_si256(p) : _mm256_maskz_loadu_epi8(first32(n), p));
}
static inline vec load_half_fp8(const void *p) { return fp8_to_units(_mm256_castsi128_si256(_mm_loadu_si128(p))); }
static inline vec spread(vec packed, uint32_t bits) {
    return words(_mm512_maskz_expand_epi16(bits, _mm512_castps_si512(packed)));
}
static inline vec multiply_add(vec s, vec w, vec x) { return _mm512_dpbf16_ps(s, (__m512bh)w, (__m512bh)x); }
static inline vec broadcast(const void *unit) {
    int32_t pair;
    memcpy(&pair, unit, sizeof pair);
    return words(_mm512_set1_epi32(pair));
}

/* For the 16 groups of 4 columns of a 2:4 mask: which two of the group's columns are kept. A 32-bit lane is a group;
 * the group's 4 bits reach its bytes 0 and 2 with one shift, and a table turns them into the first and the second
 * column. vpermi2w reads the low 6 bits of each half lane, so what the other bytes hold does not matter. */
#define GATHER
static inline vec gather_index(const uint8_t *mask) {
    /* the first column for bits 0 .. 15 without and the second with 16 added */
    static const uint8_t table[64] = {[3] = 0,  [5] = 0,  [9] = 0,  [6] = 1,  [10] = 1, [12] = 2,
                                      [19] = 1, [21] = 2, [25] = 3, [22] = 2, [26] = 3, [28] = 3};
    int64_t word;
    memcpy(&word, mask, sizeof word);
    const __m512i shifts =
        _mm512_set_epi64(0x3c3c3c3c38383838, 0x3434343430303030, 0x2c2c2c2c28282828, 0x2424242420202020,
                         0x1c1c1c1c18181818, 0x1414141410101010, 0x0c0c0c0c08080808, 0x0404040400000000);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i base = _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00040004));
    __m512i bits = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(word));
    bits = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x0f0f0f0f), _mm512_set1_epi32(0x00100000), 0xea);
    return words(_mm512_or_si512(_mm512_permutexvar_epi8(bits, _mm512_loadu_si512(table)), base));
}
static inline vec gather(vec low, vec high, vec index) {
    return words(
        _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_castps_si512(index), _mm512_castps_si512(high)));
}
/* The values of four rows of a 2:4 core in 64 columns: w[2 p + h] has in its quarter q those of the rows, one after the
 * other, for group 8 p + 2 q + h. */
static inline void load_quads(vec w[4], const char *const rows[4], int64_t at) {
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i a = _mm512_loadu_si512(rows[0] + at), b = _mm512_loadu_si512(rows[1] + at);
    const __m512i c = _mm512_loadu_si512(rows[2] + at), d = _mm512_loadu_si512(rows[3] + at);
    const vec ab = words(_mm512_permutex2var_epi64(a, low, b)), cd = words(_mm512_permutex2var_epi64(c, low, d));
    const vec ab_high = words(_mm512_permutex2var_epi64(a, high, b)), cd_high = words(_mm512_permutex2var_epi64(c, high, d));
    w[0] = _mm512_shuffle_ps(ab, cd, 0x88);
    w[1] = _mm512_shuffle_ps(ab, cd, 0xdd);
    w[2] = _mm512_shuffle_ps(ab_high, cd_high, 0x88);
    w[3] = _mm512_shuffle_ps(ab_high, cd_high, 0xdd);
}
/* Which bytes of a quarter of x, which has two groups of columns, the values of load_quads meet. A lane of `bits` has
 * the mask of its row: in the lowest byte of groups 2 q and 2 q + 1, in the next of 8 + 2 q and 8 + 2 q + 1. */
static inline void quad_index(vec index[4], const uint8_t *const rows[4], int64_t at) {
    const __m512i first = /* the bytes of the two kept columns for bits 0 .. 15 of the mask of the first group */
        _mm512_setr_epi32(0, 0, 0, 0x03020100, 0, 0x05040100, 0x05040302, 0, 0, 0x07060100, 0x07060302, 0, 0x07060504, 0, 0, 0);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(0x08080808));
    const __m512i turns =
        _mm512_setr_epi32(0x0400, 0x0c08, 0x1410, 0x1c18, 0x0501, 0x0d09, 0x1511, 0x1d19, 0x0602, 0x0e0a, 0x1612, 0x1e1a,
                          0x0703, 0x0f0b, 0x1713, 0x1f1b);
    int64_t m[4];
    for (int i = 0; i < 4; i++) memcpy(&m[i], rows[i] + at, sizeof *m);
    const __m512i bits = _mm512_permutexvar_epi8(turns, _mm512_castsi256_si512(_mm256_setr_epi64x(m[0], m[1], m[2], m[3])));
    index[0] = words(_mm512_permutexvar_epi32(bits, first)); /* which reads four bits */
    index[1] = words(_mm512_permutexvar_epi32(_mm512_srli_epi32(bits, 4), second));
    index[2] = words(_mm512_permutexvar_epi32(_mm512_srli_epi32(bits, 8), first));
    index[3] = words(_mm512_permutexvar_epi32(_mm512_srli_epi32(bits, 12), second));
}
/* s + the values of load_quads times the 64 columns of a row of x that they meet. In assembly: of many such sums a
 * compiler keeps some in memory, though the registers would do. */
static inline vec multiply_add_quads(vec s, const vec w[4], const vec index[4], const element *x) {
    vec a, b, c;
    __asm__("vmovdqu64 %[low],%[a]\n\t"
            "vmovdqu64 %[high],%[b]\n\t"
            "vpshufb %[i0],%[a],%[c]\n\t"
            "vdpbf16ps %[c],%[w0],%[s]\n\t"
            "vpshufb %[i1],%[a],%[a]\n\t"
            "vdpbf16ps %[a],%[w1],%[s]\n\t"
            "vpshufb %[i2],%[b],%[c]\n\t"
            "vdpbf16ps %[c],%[w2],%[s]\n\t"
            "vpshufb %[i3],%[b],%[b]\n\t"
            "vdpbf16ps %[b],%[w3],%[s]"
            : [s] "+v"(s), [a] "=&v"(a), [b] "=&v"(b), [c] "=&v"(c)
            : [w0] "v"(w[0]), [w1] "v"(w[1]), [w2] "v"(w[2]), [w3] "v"(w[3]), [i0] "v"(index[0]), [i1] "v"(index[1]),
              [i2] "v"(index[2]), [i3] "v"(index[3]), [low] "m"(*(const char(*)[64])x),
              [high] "m"(*(const char(*)[64])(x + 32)));
    return s;
}
/* The scales of 64 columns, one for all or `two` for 32 each, to the lanes of their groups of 4. */
static inline vec gather_scales(const weight *scales, int two) {
    if (!two) return words(_mm512_slli_epi32(_mm512_set1_epi16((int16_t)*scales), 16));
    int32_t both;
    memcpy(&both, scales, sizeof both);
    __m512i pair = _mm512_set1_epi32(both);
    pair = _mm512_mask_slli_epi32(pair, 0x00ff, pair, 16);
    return words(_mm512_and_si512(pair, _mm512_set1_epi32((int32_t)0xffff0000)));
}
/* The six pairs of a group's four columns, from the units of columns 0 and 1 and of columns 2 and 3. The vector of each
 * has the number of the mask that keeps it, less the least such number, 3. */
static inline void store_pairs(int32_t *to, vec low, vec high) {
    __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    _mm512_store_si512(to + (3 - 3) * 16, a);
    _mm512_store_si512(to + (5 - 3) * 16, _mm512_or_si512(_mm512_andnot_si512(upper, a), _mm512_slli_epi32(b, 16)));
    _mm512_store_si512(to + (6 - 3) * 16, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_slli_epi32(b, 16)));
    _mm512_store_si512(to + (9 - 3) * 16, _mm512_or_si512(_mm512_andnot_si512(upper, a), _mm512_and_si512(upper, b)));
    _mm512_store_si512(to + (10 - 3) * 16, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(upper, b)));
    _mm512_store_si512(to + (12 - 3) * 16, b);
}
/* The bits of eight groups of a mask, each times 16 in a byte: where its pair stands, in 32-bit words. */
static inline uint64_t eight_places(const uint8_t *mask) {
    uint32_t bits;
    memcpy(&bits, mask, sizeof bits);
    return _pdep_u64(bits, 0xf0f0f0f0f0f0f0f0);
}
/* The four units at `p`, four times over. */
static inline vec repeat_four(const weight *p) {
    return words(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)p)));
}
/* Unit `i` of such four in every lane; `i` is a constant once loops are unrolled. */
static inline vec broadcast_one_of(vec quad, int i) {
    __m512i v = _mm512_castps_si512(quad);
    return words(i == 0   ? _mm512_shuffle_epi32(v, 0x00)
                 : i == 1 ? _mm512_shuffle_epi32(v, 0x55)
                 : i == 2 ? _mm512_shuffle_epi32(v, 0xaa)
                          : _mm512_shuffle_epi32(v, 0xff));
}
/* The lowest byte, which makes room for the next. In assembly, as is what follows: a compiler makes four instructions of
 * these two, and two of that one. */
static inline uint64_t take_byte(uint64_t *bytes) {
    uint64_t byte;
    __asm__("movzbl %b1,%k0" : "=r"(byte) : "q"(*bytes));
    __asm__("shrq $8,%0" : "+r"(*bytes) : : "cc");
    return byte;
}
static inline vec multiply_add_at(vec s, vec w, const int32_t *x) {
    __asm__("vdpbf16ps %2,%1,%0" : "+v"(s) : "v"(w), "m"(*(const vec *)x));
    return s;
}
static inline vec load_floats(const weight *p, int64_t n) { return load_bf16(p, n); }
static inline void store_floats(weight *p, vec v, int64_t n) { store_bf16(p, v, n); }
static inline void store_elements(element *p, vec v, int64_t n) { store_bf16(p, v, n); }
static inline void store_weights(weight *p, vec v, int64_t n) {
    _mm512_mask_storeu_epi16(p, first32(n), _mm512_castps_si512(v));
}
static inline vec to_units(vec even, vec odd) {
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return words(_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

#else

#define UNIT 1
typedef float element;

static inline vec load_element(const element *p, int64_t n) { return load_f32(p, n); }
static inline vec load_int8(const void *p, int64_t n) {
    return sixteen(n >= 16 ? _mm_loadu_si128(p) : _mm_maskz_loadu_epi8(first16(n), p));
}
static inline vec load_half_int8(const void *p) { return sixteen(_mm_loadl_epi64(p)); }
static inline vec load_int4(const void *p, int64_t n) {
    return sixteen(nibbles(_mm_maskz_loadu_epi8(first16(n >= 16 ? 8 : (n + 1) / 2), p)));
}
static inline vec load_half_int4(const void *p) {
    int packed;
    memcpy(&packed, p, sizeof packed);
    return sixteen(nibbles(_mm_cvtsi32_si128(packed)));
}
/* 16 floats of e4m3. Where the exponent is 0 the size counts in units of 2^-9. */
static inline vec fp8_to_floats(__m128i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi32(bytes), size = _mm512_and_si512(wide, _mm512_set1_epi32(127));
    const __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(size, 20), _mm512_set1_epi32(120 << 23));
    const __mmask16 is_small = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(8));
    const vec unit = _mm512_set1_ps(0x1p-9f);
    const vec number = _mm512_mask_mul_ps(_mm512_castsi512_ps(bits), is_small, _mm512_cvtepi32_ps(size), unit);
    const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(wide, 7), 31);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(number), sign));
}
static inline vec load_fp8(const void *p, int64_t n) {
    return fp8_to_floats(n >= 16 ? _mm_loadu_si128(p) : _mm_maskz_loadu_epi8(first16(n), p));
}
static inline vec load_half_fp8(const void *p) { return fp8_to_floats(_mm_loadl_epi64(p)); }
static inline vec spread(vec packed, uint32_t bits) { return _mm512_maskz_expand_ps((__mmask16)bits, packed); }
static inline vec multiply_add(vec s, vec w, vec x) { return _mm512_fmadd_ps(w, x, s); }
static inline vec broadcast(const void *unit) {
    float f;
    memcpy(&f, unit, sizeof f);
    return _mm512_set1_ps(f);
}
static inline void store_elements(element *p, vec v, int64_t n) { store_f32(p, v, n); }
static inline vec to_units(vec even, vec odd) { return (void)odd, even; }

#ifdef BF16
#define NAME(f) f##_avx512_bf16
typedef uint16_t weight;
static inline vec load(const weight *p, int64_t n) { return load_bf16(p, n); }
static inline vec load_half(const weight *p) { return widen(_mm256_castsi128_si256(_mm_loadu_si128((const void *)p))); }
static inline void store_floats(weight *p, vec v, int64_t n) { store_bf16(p, v, n); }
#else
#define NAME(f) f##_avx512_f32
typedef float weight;
static inline vec load(const weight *p, int64_t n) { return load_f32(p, n); }
static inline vec load_half(const weight *p) { return _mm512_castps256_ps512(_mm256_loadu_ps(p)); }
static inline void store_floats(weight *p, vec v, int64_t n) { store_f32(p, v, n); }
#endif
static inline vec load_packed(const weight *p, int64_t n) { return load(p, n); }
static inline vec load_floats(const weight *p, int64_t n) { return load(p, n); }
static inline void store_weights(weight *p, vec v, int64_t n) { store_floats(p, v, n); }

#endif

#include "loops.h"

END_TARGET
