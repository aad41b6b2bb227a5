/* The loops of a linear, over the primitives of one processor level and one weight type.
 *
 * Before including this file, define
 *   NAME(f)                  f with the suffix of this kernel
 *   weight, element          types of the stored weights (and x, bias, y) and of the numbers between the steps
 *   LANES, UNIT              32-bit lanes of a vector, columns in a lane (2: pairs of bf16, 1: fp32)
 *   TILE                     weight rows that the panel way multiplies at once
 *   DOT_ROWS                 most rows of x for the dot way
 *   vec                      a vector of LANES floats or units
 * and static inline functions
 *   load(const weight *, n)  n <= STEP weights as units, zeros after them
 *   load_element(const element *, n)
 *   load_half(const weight *)          STEP / 2 weights, packed, rest anything
 *   load_packed(const weight *, n)     min(n, STEP) weights, packed, rest anything
 *   spread(vec packed, uint32_t bits)  the packed weights to the columns whose bit is set, as units, zeros elsewhere
 *   multiply_add(vec sum, vec w, vec x), add(vec, vec), zero(), broadcast(const void *unit), sum(vec)
 *   sum_four(float to[4], vec a, vec b, vec c, vec d)        of the lanes of each, in less time than four sums
 *   load_vec(const void *), store_vec(void *, vec)           LANES 32-bit words, any alignment
 *   to_units(vec even, vec odd)        rows of floats to a row of units (UNIT 1: even)
 *   load_floats(const weight *, n), store_floats(weight *, vec, n), store_elements(element *, vec, n)  n <= LANES
 *   store_weights(weight *, vec units, n)                    n <= STEP
 *   transpose(vec[LANES])              of 32-bit words
 *   load_int8(const void *, n), load_int4, load_fp8          n <= STEP of these as units, zeros after them
 *   load_half_int8(const void *), load_half_int4, load_half_fp8   STEP / 2 of them, packed, rest anything
 *   fused(vec sum, vec a, vec b)       sum + a * b, of floats
 *
 * With GATHER defined (2:4 in pairs of bf16, see avx512.h) also gather_index, gather, gather_scales, load_quads,
 * quad_index, multiply_add_quads, store_four, store_pairs, eight_places, repeat_four, broadcast_one_of,
 * take_byte and multiply_add_at.
 *
 * The dot way (few rows): the lanes run along the columns; a vector of weights is unpacked in registers and multiplied
 * by every row of x, which may go in pieces, and a sum over lanes ends the row, four of them together; or, by quads, the
 * lanes are four rows by a quarter of the columns, and a sum over quarters ends four rows. The panel way (more rows):
 * the lanes run along LANES rows of x; weights are unpacked into a tile in cache and broadcast (those of a 2:4 core may
 * stay packed: packed_pairs), so that no sum over lanes is needed and the output of a step is laid out as the input of
 * the next.
 */
#include <string.h>

#include "linear.h"

#ifdef GATHER
enum { CAN_GATHER = 1 };
#else
enum { CAN_GATHER = 0 };
#endif
enum { STEP = LANES * UNIT, TILE_STRIDE = DEPTH + 16, L2 = 2, L1 = 3 /* the cache __builtin_prefetch fills */ };
_Static_assert(CHUNK % TILE == 0 && DEPTH % LANES == 0 && STEP % 8 == 0, "tiles, steps and chunks must fit each other");

/* The bits of `n` <= STEP columns from byte `mask` on. */
static inline uint32_t bits_of(const uint8_t *mask, int64_t n) {
    uint32_t bits = 0;
    if (n == STEP) {
        memcpy(&bits, mask, STEP / 8);
        return bits;
    }
    for (int64_t byte = 0; byte * 8 < n; byte++) bits |= (uint32_t)mask[byte] << (8 * byte);
    return bits & ((1u << n) - 1);
}

/* Where number `index` of a matrix is stored. An int4 has an even index. */
static inline const void *place(const void *numbers, int64_t index, int type) {
    return (const char *)numbers + (type == FLOATS ? index * (int64_t)sizeof(weight) : type == INT4 ? index / 2 : index);
}
static inline vec load_as(const void *p, int64_t n, int type) {
    return type == FLOATS ? load(p, n)
           : type == INT8 ? load_int8(p, n)
           : type == INT4 ? load_int4(p, n)
                          : load_fp8(p, n);
}
static inline vec load_half_as(const void *p, int type) {
    return type == FLOATS ? load_half(p)
           : type == INT8 ? load_half_int8(p)
           : type == INT4 ? load_half_int4(p)
                          : load_half_fp8(p);
}
static inline float scale_at(const weight *p) {
    float f;
    uint32_t bits = 0;
    if (sizeof *p == sizeof f)
        memcpy(&f, p, sizeof *p);
    else {
        memcpy((char *)&bits, p, sizeof *p);
        bits <<= 16;
        memcpy(&f, &bits, sizeof f);
    }
    return f;
}

/* The next `n` <= STEP columns of a packed row: `*at` values are used up already. A mask that sets more bits than there
 * are values reads zeros for the rest, never memory beyond the row. */
static inline vec next_columns(const void *values, int64_t kept, int64_t *at, const uint8_t *mask, int64_t n, int half,
                               int type) {
    uint32_t bits = bits_of(mask, n);
    const void *next = place(values, *at, type);
    if (half && n == STEP) {
        vec packed = load_half_as(next, type);
        *at += STEP / 2;
        return spread(packed, bits);
    }
    vec packed = type == FLOATS ? load_packed(next, kept - *at) : load_as(next, least(STEP, kept - *at), type);
    *at = least(kept, *at + __builtin_popcount(bits));
    return spread(packed, bits);
}

/* ---- the dot way ---- */

/* out[r][i] = weights[i] . x[r] for `rows` dense weight rows of `n` columns; x has `count` rows (a constant).
 * `scales` has one for each row of integers. Sums over lanes take long beside a short row, so four end together. */
static inline __attribute__((always_inline)) void dense_dot(const void *weights, int type, const weight *scales,
                                                            int64_t rows, int64_t n, const void *x, int64_t stride,
                                                            int is_weight, int count, int64_t valid,
                                                            float out[][CHUNK]) {
    const int at_once = count < 4 ? 4 / count : 1; /* rows of weights */
    for (int64_t i = 0; i < rows; i += at_once) {
        vec sums[8];
#pragma GCC unroll 8
        for (int s = 0; s < at_once * count; s++) sums[s] = zero();
#pragma GCC unroll 4
        for (int j = 0; j < at_once; j++)
            for (int64_t c = 0; c < n; c += STEP) {
                const int64_t m = least(STEP, n - c);
                const vec w = load_as(place(weights, least(i + j, rows - 1) * n + c, type), m, type);
#pragma GCC unroll 8
                for (int r = 0; r < count; r++) {
                    const int64_t at = least(r, valid - 1) * stride + c;
                    const vec v = is_weight ? load((const weight *)x + at, m) : load_element((const element *)x + at, m);
                    sums[j * count + r] = multiply_add(sums[j * count + r], w, v);
                }
            }
        for (int s = 0; s < at_once * count; s += 4) {
            float four[4];
            sum_four(four, sums[s], sums[s + 1], sums[s + 2], sums[s + 3]);
            for (int k = 0; k < 4; k++) {
                const int64_t row = i + (s + k) / count;
                if (row < rows) out[(s + k) % count][row] = type == FLOATS ? four[k] : scale_at(scales + row) * four[k];
            }
        }
    }
}

enum { ROWS = 2 /* of the core that packed_dot takes at once */, WIDE = 2 * STEP, QUAD_ROWS = 12 };

#ifdef GATHER
enum { VALUES_AHEAD = 3072, MASK_AHEAD = 640 /* how many bytes further on in a row is fetched */ };

/* Fetch what `next` points to: into L1 where few rows of x leave room there, else into L2. */
static inline __attribute__((always_inline)) void fetch_ahead(const void *next, int into_l1) {
    if (into_l1)
        __builtin_prefetch(next, 0, L1);
    else
        __builtin_prefetch(next, 0, L2);
}

/* sums += a step of WIDE columns of `rows` packed 2:4 rows times `x_rows` rows of x; `at` is where its mask begins in a
 * row. All other places are multiples of it, which an instruction can add up itself. What lies `values_ahead` and
 * `mask_ahead` bytes further on is fetched. */
static inline __attribute__((always_inline)) void packed_step(const struct linear *linear, int type, int rows,
                                                              int x_rows, const void *const values[],
                                                              const uint8_t *const mask[], int64_t at,
                                                              int64_t values_ahead, int64_t mask_ahead,
                                                              vec sums[][8]) {
    const int64_t bytes = type == FLOATS ? 4 * sizeof(weight) : type == INT4 ? 2 : 4; /* of values, by one of mask */
    const int into_l1 = x_rows == 1 || (x_rows <= 4 && linear->panels_at_once == 4);
    vec w[ROWS], index[ROWS];
    if (type != FLOATS) __asm__("" : "+r"(at)); /* lest the compiler count up a pointer for each row */
#pragma GCC unroll 2
    for (int j = 0; j < rows; j++) {
        const char *here = (const char *)values[j] + at * bytes;
        fetch_ahead(here + values_ahead, into_l1);
        w[j] = load_as(here, STEP, type);
        index[j] = gather_index(mask[j] + at);
    }
    if (at % 64 == 0)
#pragma GCC unroll 4
        for (int j = 0; j < rows; j++) fetch_ahead(mask[j] + at + mask_ahead, into_l1);
#pragma GCC unroll 8
    for (int r = 0; r < x_rows; r++) {
        const element *x = (const element *)linear->u + least(r, linear->rows - 1) * linear->in + at * 8;
#pragma GCC unroll 4
        for (int j = 0; j < rows; j++)
            sums[j][r] =
                multiply_add(sums[j][r], w[j], gather(load_element(x, STEP), load_element(x + STEP, STEP), index[j]));
    }
}

/* Totals of integers of `rows` packed 2:4 rows times `x_rows` rows of x, for all whole groups of columns; returns how
 * many columns those are. A scale counts for `steps` (constant if 1) of WIDE columns, or, if `halved` (constant), two
 * for one step. `at_once` rows meet x together. */
static inline __attribute__((always_inline)) int64_t integer_steps(const struct linear *linear, int type, int halved,
                                                                   int64_t steps, int at_once, int x_rows,
                                                                   const void *const values[],
                                                                   const uint8_t *const mask[],
                                                                   const weight *const scales[], vec totals[][8]) {
    const int64_t bytes = steps * (WIDE / 8); /* of the mask */
    int64_t at = 0;
    for (int64_t g = 0; at + bytes <= linear->in / 8; g += halved ? 2 : 1, at += bytes) {
#pragma GCC unroll 4
        for (int j = 0; j < ROWS; j += at_once) {
            vec sums[ROWS][8];
#pragma GCC unroll 4
            for (int i = 0; i < at_once; i++)
#pragma GCC unroll 8
                for (int r = 0; r < x_rows; r++) sums[i][r] = zero();
            for (int64_t step = at; step < at + bytes; step += WIDE / 8)
                packed_step(linear, type, at_once, x_rows, values + j, mask + j, step, VALUES_AHEAD, MASK_AHEAD,
                            sums);
#pragma GCC unroll 4
            for (int i = 0; i < at_once; i++) {
                const vec scale = gather_scales(scales[j + i] + g, halved);
#pragma GCC unroll 8
                for (int r = 0; r < x_rows; r++) totals[j + i][r] = fused(totals[j + i][r], scale, sums[i][r]);
            }
        }
    }
    return at * 8;
}
#endif

/* The same for packed rows, count[0] from first[0] on and count[1] from first[1] on: two places, because memory gives
 * more to a thread that reads in two. Several chains of sums run at once, since a multiply-add takes several cycles.
 * Where the processor can pick from two vectors of x (`gathers`, 2:4 only), the values stay as they are packed and meet
 * the columns of x that they belong to; otherwise they are spread to their columns. Integers are summed up by groups
 * of columns, whose sums then meet their scales; in the usual groups of 2:4 step by step (integer_steps). */
static inline __attribute__((always_inline)) void packed_dot(const struct linear *linear, int type,
                                                             const int64_t first[2], const int64_t count[2],
                                                             int gathers, int half, int x_rows,
                                                             float out[2][QUAD_ROWS][CHUNK]) {
    const int ahead = x_rows == 1 ? 2 : 1;
    /* Rows that meet x together: so many that their sums stay in registers; those of
     * bytes are needed only at the end of a group of columns. */
    const int at_once = x_rows == 8 && (type == FLOATS || type == INT4) ? 1 : ROWS;
    const element *u = linear->u;
    const int64_t in = linear->in, kept = linear->kept, last = linear->rows - 1;
    const int64_t group = type == FLOATS ? in : linear->integers.group, groups = (in + group - 1) / group;
    for (int64_t i = 0; i < count[0] || i < count[1]; i++) {
        const void *values[ROWS];
        const uint8_t *mask[ROWS];
        const weight *scales[ROWS];
        int64_t at[ROWS], c = 0;
        vec sums[ROWS][8], more[ROWS], totals[ROWS][8];
        for (int j = 0; j < ROWS; j++) {
            int side = count[1] ? j : 0;
            int64_t row = first[side] + least(i, count[side] - 1);
            values[j] = place(linear->values, row * linear->stride, type);
            mask[j] = linear->mask + row * linear->mask_stride;
            scales[j] = type == FLOATS ? 0 : (const weight *)linear->integers.core_scales + row * groups;
            at[j] = 0;
            for (int r = 0; r < x_rows; r++) totals[j][r] = zero();
        }
#ifdef GATHER
        if (gathers && type != FLOATS) {
            if (group == WIDE)
                c = integer_steps(linear, type, 0, 1, at_once, x_rows, values, mask, scales, totals);
            else if (group % WIDE == 0)
                c = integer_steps(linear, type, 0, group / WIDE, at_once, x_rows, values, mask, scales, totals);
            else if (group == WIDE / 2)
                c = integer_steps(linear, type, 1, 1, at_once, x_rows, values, mask, scales, totals);
            for (int j = 0; j < ROWS; j++) at[j] = c / 2;
        }
#endif
        for (int64_t g = c / group; g < groups; g++) {
            const int64_t end = least(in, (g + 1) * group);
            for (int j = 0; j < ROWS; j++) {
                more[j] = zero();
                for (int r = 0; r < x_rows; r++) sums[j][r] = zero();
            }
#ifdef GATHER
            if (gathers)
                for (int64_t step = c / 8; c + WIDE <= end; c += WIDE, step += WIDE / 8)
#pragma GCC unroll 4
                    for (int j = 0; j < ROWS; j += at_once)
                        packed_step(linear, type, at_once, x_rows, values + j, mask + j, step, VALUES_AHEAD, MASK_AHEAD,
                                    sums + j);
            if (gathers)
                for (int j = 0; j < ROWS; j++) at[j] = c / 2;
#else
            (void)gathers, (void)at_once;
#endif
            for (; c + ahead * STEP <= end; c += ahead * STEP)
                for (int a = 0; a < ahead; a++) {
                    vec w[ROWS];
                    int64_t now = c + a * STEP;
                    for (int j = 0; j < ROWS; j++)
                        w[j] = next_columns(values[j], kept, &at[j], mask[j] + now / 8, STEP, half, type);
                    for (int r = 0; r < x_rows; r++) {
                        vec x = load_element(u + least(r, last) * in + now, STEP);
                        for (int j = 0; j < ROWS; j++) {
                            vec *to = a ? &more[j] : &sums[j][r];
                            *to = multiply_add(*to, w[j], x);
                        }
                    }
                }
            for (; c < end; c += STEP) {
                int64_t n = least(STEP, end - c);
                for (int j = 0; j < ROWS; j++) {
                    vec w = next_columns(values[j], kept, &at[j], mask[j] + c / 8, n, half, type);
                    for (int r = 0; r < x_rows; r++)
                        sums[j][r] = multiply_add(sums[j][r], w, load_element(u + least(r, last) * in + c, n));
                }
            }
            for (int j = 0; j < ROWS; j++) {
                float f = type == FLOATS ? 1 : scale_at(scales[j] + g);
                sums[j][0] = add(sums[j][0], more[j]);
                for (int r = 0; r < x_rows; r++)
                    totals[j][r] = type == FLOATS ? sums[j][r] : fused(totals[j][r], broadcast(&f), sums[j][r]);
            }
        }
        for (int j = 0; j < ROWS && x_rows == 1; j++) out[j][0][i] = sum(totals[j][0]);
        for (int r = 0; r < x_rows && x_rows > 1; r += 2) {
            float four[4];
            sum_four(four, totals[0][r], totals[1][r], totals[0][r + 1], totals[1][r + 1]);
            for (int k = 0; k < 4; k++) out[k % ROWS][r + k / ROWS][i] = four[k];
        }
    }
}

#ifdef GATHER
/* What packed_dot does, to the bit, of a 2:4 core in floats and an x that the L1 cache does not hold: PAIRS times ROWS
 * rows of the core meet a piece of x, before the next piece is read. */
static inline __attribute__((always_inline)) void pieces_dot(const struct linear *linear, const int64_t first[2],
                                                             const int64_t count[2], int x_rows,
                                                             float out[2][QUAD_ROWS][CHUNK]) {
    enum { PAIRS = 8, PIECE = 3072 /* columns: of four rows of x 24 KB, half of L1 */ };
    const int64_t in = linear->in, whole = in / WIDE * WIDE, pairs = count[0] > count[1] ? count[0] : count[1];
    for (int64_t i = 0; i < pairs; i += PAIRS) {
        const int64_t n = least(PAIRS, pairs - i);
        const void *values[PAIRS][ROWS];
        const uint8_t *mask[PAIRS][ROWS];
        vec totals[PAIRS][ROWS][4];
        for (int64_t t = 0; t < n; t++)
            for (int j = 0; j < ROWS; j++) {
                const int side = count[1] ? j : 0;
                const int64_t row = first[side] + least(i + t, count[side] - 1);
                values[t][j] = place(linear->values, row * linear->stride, FLOATS);
                mask[t][j] = linear->mask + row * linear->mask_stride;
                for (int r = 0; r < x_rows; r++) totals[t][j][r] = zero();
            }
        for (int64_t c = 0; c < whole; c += PIECE)
            for (int64_t t = 0; t < n; t++) {
                /* The same piece of the next row; after the last row the next piece of the first; at the end of those
                 * the beginning of the next row. */
                const int ends = c + PIECE >= whole;
                const int64_t on = t + 1 < n || ends ? 1 : 1 - n, further = t + 1 < n ? 0 : ends ? -c / 8 : PIECE / 8;
                const int64_t values_ahead = on * linear->row_bytes + further * 4 * (int64_t)sizeof(weight);
                const int64_t mask_ahead = on * linear->mask_stride + further;
                vec sums[ROWS][8];
#pragma GCC unroll 8
                for (int s = 0; s < ROWS * x_rows; s++) sums[s % ROWS][s / ROWS] = totals[t][s % ROWS][s / ROWS];
                for (int64_t at = c / 8; at < least(c + PIECE, whole) / 8; at += WIDE / 8)
                    packed_step(linear, FLOATS, ROWS, x_rows, values[t], mask[t], at, values_ahead, mask_ahead, sums);
#pragma GCC unroll 8
                for (int s = 0; s < ROWS * x_rows; s++) totals[t][s % ROWS][s / ROWS] = sums[s % ROWS][s / ROWS];
            }
        for (int64_t t = 0; t < n; t++) {
            for (int j = 0; j < ROWS; j++)
                for (int64_t c = whole, at = whole / 2; c < in; c += STEP) {
                    const int64_t m = least(STEP, in - c);
                    const vec w = next_columns(values[t][j], linear->kept, &at, mask[t][j] + c / 8, m, 1, FLOATS);
                    for (int r = 0; r < x_rows; r++) {
                        const element *x = (const element *)linear->u + least(r, linear->rows - 1) * in;
                        totals[t][j][r] = multiply_add(totals[t][j][r], w, load_element(x + c, m));
                    }
                }
            for (int r = 0; r < x_rows; r += 2) {
                float four[4];
                sum_four(four, totals[t][0][r], totals[t][1][r], totals[t][0][r + 1], totals[t][1][r + 1]);
                for (int k = 0; k < 4; k++) out[k % ROWS][r + k / ROWS][i + t] = four[k];
            }
        }
    }
}
/* A function of its own for a number of rows of x, so that registers suffice. */
#define FOR_ROWS(dot, rows)                                                                                   \
    static __attribute__((noinline)) void dot##_##rows(const struct linear *linear, const int64_t first[2],   \
                                                       const int64_t count[2], float out[2][QUAD_ROWS][CHUNK]) { \
        dot(linear, first, count, rows, out);                                                                 \
    }
FOR_ROWS(pieces_dot, 2)
FOR_ROWS(pieces_dot, 4)

/* What packed_dot does, of a 2:4 core in floats by quads, for `x_rows` rows of x (a constant, at least as many as there
 * are): a quarter of a vector has the values of four rows of the core for one group of columns, and picks what they meet
 * from a quarter of x, which is read as it lies. So a multiply-add needs one shuffle and half a load. */
static inline __attribute__((always_inline)) void quad_dot(const struct linear *linear, const int64_t first[2],
                                                           const int64_t count[2], int x_rows,
                                                           float out[2][QUAD_ROWS][CHUNK]) {
    const int64_t in = linear->in, whole = in / WIDE * WIDE;
    const element *x[QUAD_ROWS];
    for (int r = 0; r < x_rows; r++) x[r] = (const element *)linear->u + least(r, linear->rows - 1) * in;
    for (int64_t i = 0; i < count[0] || i < count[1]; i += 2) {
        const char *values[4];
        const uint8_t *mask[4];
        for (int j = 0; j < 4; j++) {
            const int side = count[1] ? j / 2 : 0;
            const int64_t row = first[side] + least(i + j % 2, count[side] - 1);
            values[j] = place(linear->values, row * linear->stride, FLOATS);
            mask[j] = linear->mask + row * linear->mask_stride;
        }
        vec sums[QUAD_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < x_rows; r++) sums[r] = zero();
        for (int64_t at = 0; at < whole / 8; at += WIDE / 8) {
            vec w[4], index[4];
            load_quads(w, values, at * 8);
            quad_index(index, mask, at);
            for (int j = 0; j < 4; j++) {
                fetch_ahead(values[j] + at * 8 + VALUES_AHEAD, 0);
                if (at % 64 == 0) fetch_ahead(mask[j] + at + MASK_AHEAD, 0);
            }
#pragma GCC unroll 16
            for (int r = 0; r < x_rows; r++) sums[r] = multiply_add_quads(sums[r], w, index, x[r] + at * 8);
        }
        float four[QUAD_ROWS][4];
#pragma GCC unroll 16
        for (int r = 0; r < x_rows; r++) store_four(four[r], sums[r]);
        for (int j = 0; j < 4; j++) {
            int64_t at = whole / 2;
            for (int64_t c = whole; c < in; c += STEP) {
                const int64_t n = least(STEP, in - c);
                const vec w = next_columns(values[j], linear->kept, &at, mask[j] + c / 8, n, 1, FLOATS);
                for (int r = 0; r < x_rows; r++)
                    four[r][j] += sum(multiply_add(zero(), w, load_element(x[r] + c, n)));
            }
            for (int r = 0; r < x_rows; r++) out[j / 2][r][i + j % 2] = four[r][j];
        }
    }
}
FOR_ROWS(quad_dot, 8)
FOR_ROWS(quad_dot, 12)
typedef void quad_dot_of(const struct linear *, const int64_t first[2], const int64_t count[2],
                         float out[2][QUAD_ROWS][CHUNK]);
static quad_dot_of *const QUADS[] = {quad_dot_8, quad_dot_12};

/* Whether blocks go by dense_quads, which counts up to four rows of x as four. */
static inline int quads_of_blocks(int type, int64_t rows) { return type == FLOATS && rows > 2; }

/* dense_dot of floats by quads: four rows of weights meet four of x at once. */
static void dense_quads(const weight *weights, int64_t rows, int64_t n, const weight *x, int64_t stride, int64_t x_rows,
                        float out[][CHUNK]) {
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t r = 0; r < x_rows; r += 4) {
            vec sums[4][4];
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) sums[j / 4][j % 4] = zero();
            for (int64_t c = 0; c < n; c += STEP) {
                const int64_t m = least(STEP, n - c);
                vec w[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) w[j] = load(weights + least(i + j, rows - 1) * n + c, m);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    const vec v = load(x + least(r + k, x_rows - 1) * stride + c, m);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) sums[j][k] = multiply_add(sums[j][k], w[j], v);
                }
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
                sum_four(out[r + k] + i, sums[0][k], sums[1][k], sums[2][k], sums[3][k]);
        }
}
#endif

#define BY_COUNT(rows, call)                              \
    switch ((rows) <= 2 ? (rows) : (rows) <= 4 ? 4 : 8) { \
    case 1: {                                             \
        enum { COUNT = 1 };                               \
        call;                                             \
        break;                                            \
    }                                                     \
    case 2: {                                             \
        enum { COUNT = 2 };                               \
        call;                                             \
        break;                                            \
    }                                                     \
    case 4: {                                             \
        enum { COUNT = 4 };                               \
        call;                                             \
        break;                                            \
    }                                                     \
    default: {                                            \
        enum { COUNT = 8 };                               \
        call;                                             \
    }                                                     \
    }

/* packed_dot for each kind of linear and number of rows; a function for each kind, so that registers suffice. */
typedef void packed_dot_of(const struct linear *, const int64_t first[2], const int64_t count[2],
                           float out[2][QUAD_ROWS][CHUNK]);
#define PACKED_DOT(name, type, gathers, half)                                                                 \
    static __attribute__((noinline)) void name(const struct linear *linear, const int64_t first[2],           \
                                               const int64_t count[2], float out[2][QUAD_ROWS][CHUNK]) {              \
        BY_COUNT(linear->rows, packed_dot(linear, type, first, count, gathers, half, COUNT, out))             \
    }
#define PACKED_DOTS(name, type)                                                                               \
    PACKED_DOT(name##_any, type, 0, 0)                                                                        \
    PACKED_DOT(name##_half, type, 0, 1)                                                                       \
    PACKED_DOT(name##_two_of_four, type, CAN_GATHER, 1)
PACKED_DOTS(floats, FLOATS)
PACKED_DOTS(int8, INT8)
PACKED_DOTS(int4, INT4)
PACKED_DOTS(fp8, FP8)
static packed_dot_of *const DOTS[][3] = {
    [FLOATS] = {floats_any, floats_half, floats_two_of_four},
    [INT8] = {int8_any, int8_half, int8_two_of_four},
    [INT4] = {int4_any, int4_half, int4_two_of_four},
    [FP8] = {fp8_any, fp8_half, fp8_two_of_four},
};

/* The scales from number `index` on; null for a matrix in floats. */
static inline const weight *scales_of(const void *scales, int64_t index) {
    return scales ? (const weight *)scales + index : 0;
}

static void emit_elements(element *to, int64_t stride, int64_t rows, float from[][CHUNK], int64_t n) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += LANES)
            store_elements(to + r * stride + i, load_vec(from[r] + i), least(LANES, n - i));
}

static void emit_outputs(const struct linear *linear, int64_t first, float from[][CHUNK], int64_t n) {
    for (int64_t r = 0; r < linear->rows; r++)
        for (int64_t i = 0; i < n; i += LANES) {
            int64_t m = least(LANES, n - i);
            vec v = load_vec(from[r] + i);
            if (linear->bias) v = add(v, load_floats((const weight *)linear->bias + first + i, m));
            store_floats((weight *)linear->y + r * linear->y_stride + first + i, v, m);
        }
}

/* x to the type between the steps, where there is no `right` that would do it. */
static void NAME(convert)(struct linear *linear, int64_t task) {
    (void)task;
    int64_t n = linear->rows * linear->in;
    for (int64_t i = 0; i < n; i += LANES)
        store_elements((element *)linear->packed + i, load_floats((const weight *)linear->x + i, least(LANES, n - i)),
                       least(LANES, n - i));
}

static void NAME(right_dot)(struct linear *linear, int64_t task) {
    float out[QUAD_ROWS][CHUNK];
    struct span span = span_of(&linear->right_cut, task);
    int64_t d = linear->right_cut.size;
    for (int64_t b = span.block; b < span.block + span.blocks; b++) {
        const int type = linear->integers.blocks;
        const void *weights = place(linear->right, (b * d + span.row) * d, type);
        const weight *scales = scales_of(linear->integers.right_scales, b * d + span.row);
        const weight *x = (const weight *)linear->x + b * d;
#ifdef GATHER
        if (quads_of_blocks(type, linear->rows))
            dense_quads(weights, span.rows, d, x, linear->in, linear->rows, out);
        else
#endif
        if (type == FLOATS)
            BY_COUNT(linear->rows,
                     dense_dot(weights, FLOATS, 0, span.rows, d, x, linear->in, 1, COUNT, linear->rows, out))
        else
            BY_COUNT(linear->rows,
                     dense_dot(weights, INT8, scales, span.rows, d, x, linear->in, 1, COUNT, linear->rows, out))
        emit_elements((element *)linear->u + b * d + span.row, linear->in, linear->rows, out, span.rows);
    }
}

/* Rows of the core, count[0] <= CHUNK from first[0] on and count[1] from first[1] on, to z, or without `left` to y. */
static void core_rows_dot(const struct linear *linear, const int64_t first[2], const int64_t count[2]) {
    float out[2][QUAD_ROWS][CHUNK];
    const int kind = CAN_GATHER && linear->two_of_four ? 2 : linear->half;
#ifdef GATHER
    if (linear->quads)
        QUADS[(linear->rows - 5) / 4](linear, first, count, out);
    else if (linear->pieces)
        (linear->rows == 2 ? pieces_dot_2 : pieces_dot_4)(linear, first, count, out);
    else
#endif
        DOTS[linear->integers.core][kind](linear, first, count, out);
    for (int side = 0; side < 2 && count[side]; side++)
        if (linear->left)
            emit_elements((element *)linear->z + first[side], linear->out, linear->rows, out[side], count[side]);
        else
            emit_outputs(linear, first[side], out[side], count[side]);
}

/* Two of the cut's spans: `task`, and the one half of the linear further. */
static void NAME(core_dot)(struct linear *linear, int64_t task) {
    int64_t tasks = (linear->core_cut.tasks + 1) / 2, first[2] = {0}, count[2] = {0};
    for (int side = 0; side < 2 && task + side * tasks < linear->core_cut.tasks; side++) {
        struct span span = span_of(&linear->core_cut, task + side * tasks);
        first[side] = span.block * linear->core_cut.size + span.row;
        count[side] = span.rows * span.blocks;
    }
    core_rows_dot(linear, first, count);
}

static void NAME(left_dot)(struct linear *linear, int64_t task) {
    float out[QUAD_ROWS][CHUNK];
    struct span span = span_of(&linear->left_cut, task);
    int64_t d = linear->left_cut.size;
    for (int64_t b = span.block; b < span.block + span.blocks; b++) {
        const int type = linear->integers.blocks;
        const void *weights = place(linear->left, (b * d + span.row) * d, type);
        const weight *scales = scales_of(linear->integers.left_scales, b * d + span.row);
        const element *z = (const element *)linear->z + b * d;
#ifdef GATHER
        if (quads_of_blocks(type, linear->rows))
            dense_quads(weights, span.rows, d, z, linear->out, linear->rows, out);
        else
#endif
        if (type == FLOATS)
            BY_COUNT(linear->rows,
                     dense_dot(weights, FLOATS, 0, span.rows, d, z, linear->out, 0, COUNT, linear->rows, out))
        else
            BY_COUNT(linear->rows,
                     dense_dot(weights, INT8, scales, span.rows, d, z, linear->out, 0, COUNT, linear->rows, out))
        emit_outputs(linear, b * d + span.row, out, span.rows);
    }
}

/* ---- the panel way ---- */

/* Bring LANES rows of x into a panel: (in / UNIT) vectors of units, a lane for each row. Without `right` it is u. The
 * first task brings the rows behind the panels into the type between the steps, too. */
static void NAME(pack)(struct linear *linear, int64_t task) {
    if (!task && linear->behind && linear->behind->packed) NAME(convert)(linear->behind, 0);
    int64_t units = (linear->in + UNIT - 1) / UNIT;
    int64_t panel = task % linear->panel_count, start = task / linear->panel_count * PACK_COLUMNS;
    int64_t end = least(linear->in, start + PACK_COLUMNS), rows = least(LANES, linear->rows - panel * LANES);
    int32_t *to = (int32_t *)linear->packed + (panel * units + start / UNIT) * LANES;
    const weight *x = (const weight *)linear->x + panel * LANES * linear->in;
    for (int64_t c = start; c < end; c += STEP) {
        vec v[LANES];
        int64_t n = least(STEP, end - c);
        for (int64_t r = 0; r < LANES; r++) v[r] = r < rows ? load(x + r * linear->in + c, n) : zero();
        transpose(v);
        for (int64_t k = 0; k * UNIT < n; k++, to += LANES) store_vec(to, v[k]);
    }
}

/* Memory that is wanted soon: AHEAD_BYTES of each of TILE rows. */
struct ahead {
    const char *start;
    int64_t stride;
};
enum { AHEAD_BYTES = 512, AHEAD_STEP = DEPTH * 64 / (TILE * AHEAD_BYTES) };

/* sums (TILE, count * LANES, row stride `stride`) += tile (TILE, n units) times `count` panels; count is a constant.
 * With `scales` (TILE) each row of the tile counts by its own. What is ahead is fetched meanwhile, a line every few
 * multiply-adds, so that memory and arithmetic overlap. */
static inline __attribute__((always_inline)) void multiply_tile(const int32_t *tile, const float *scales,
                                                                const int32_t *panel, int64_t panel_stride, int64_t n,
                                                                float *sums, int64_t stride, int begin, int count,
                                                                struct ahead ahead) {
    vec acc[TILE][2];
    for (int i = 0; i < TILE; i++)
        for (int p = 0; p < 2; p++)
            acc[i][p] = begin || scales || p >= count ? zero() : load_vec(sums + i * stride + p * LANES);
    const int both = 2 / count; /* units at once: of one panel two, each with sums of its own, lest one wait for another */
    for (int64_t k = 0; k < n; k += both) {
        if (k % AHEAD_STEP == 0) {
            int64_t at = k / AHEAD_STEP * 64;
            __builtin_prefetch(ahead.start + at / AHEAD_BYTES * ahead.stride + at % AHEAD_BYTES, 0, L2);
        }
        for (int j = 0; j < both && k + j < n; j++) {
            vec x[2];
            for (int p = 0; p < count; p++) x[p] = load_vec(panel + p * panel_stride + (k + j) * LANES);
            for (int i = 0; i < TILE; i++) {
                vec w = broadcast(tile + i * TILE_STRIDE + k + j);
                for (int p = 0; p < count; p++) acc[i][p + j] = multiply_add(acc[i][p + j], w, x[p]);
            }
        }
    }
    for (int i = 0; i < TILE; i++) {
        if (count == 1) acc[i][0] = add(acc[i][0], acc[i][1]);
        for (int p = 0; p < count; p++) {
            float *to = sums + i * stride + p * LANES;
            if (scales) acc[i][p] = fused(begin ? zero() : load_vec(to), broadcast(scales + i), acc[i][p]);
            store_vec(to, acc[i][p]);
        }
    }
}

/* All panels times a tile of `rows` <= CHUNK unpacked weight rows; `panel` points at the tile's first column. `scales`
 * (CHUNK) or null: those of the rows. */
static void multiply_panels(const struct linear *linear, const int32_t *tile, const float *scales, int64_t rows,
                            const int32_t *panel, int64_t panel_stride, int64_t n, float *sums, int begin,
                            struct ahead ahead) {
    int64_t stride = linear->panel_count * LANES;
    for (int64_t p = 0; p < linear->panel_count; p += 2)
        for (int64_t i = 0; i < rows; i += TILE) {
            const int32_t *t = tile + i * TILE_STRIDE, *x = panel + p * panel_stride;
            float *to = sums + i * stride + p * LANES;
            struct ahead mine =
                p ? (struct ahead){(const char *)t, 0} : (struct ahead){ahead.start + i * ahead.stride, ahead.stride};
            if (p + 1 < linear->panel_count)
                multiply_tile(t, scales ? scales + i : 0, x, panel_stride, n, to, stride, begin, 2, mine);
            else
                multiply_tile(t, scales ? scales + i : 0, x, panel_stride, n, to, stride, begin, 1, mine);
        }
}

static inline int64_t units_of(int64_t columns) { return (columns + UNIT - 1) / UNIT; }

/* sums (rows, panels) = dense weight rows (rows, columns) times the panels. */
static void dense_panels(const struct linear *linear, const void *weights, const weight *scales, int64_t rows,
                         int64_t columns, const int32_t *panel, int64_t panel_stride, float *sums) {
    _Alignas(64) int32_t tile[CHUNK * TILE_STRIDE];
    float own[CHUNK] = {0};
    const int type = linear->integers.blocks;
    for (int64_t i = 0; i < rows && scales; i++) own[i] = scale_at(scales + i);
    if (rows % TILE) memset(tile + rows * TILE_STRIDE, 0, sizeof(int32_t) * TILE_STRIDE * (TILE - rows % TILE));
    for (int64_t k = 0; k < units_of(columns); k += DEPTH) {
        int64_t start = k * UNIT, n = least(DEPTH * UNIT, columns - start);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < n; c += STEP)
                store_vec(tile + i * TILE_STRIDE + c / UNIT,
                          load_as(place(weights, i * columns + start + c, type), least(STEP, n - c), type));
        multiply_panels(linear, tile, scales ? own : 0, rows, panel + k * LANES, panel_stride, units_of(n), sums, k == 0,
                        (struct ahead){(const char *)tile, 0});
    }
}

/* The same for packed rows from row `first` of the core on; integers by their groups of columns, or parts of these.
 * With GATHER, 2:4 goes through packed_pairs instead. */
static void packed_panels(const struct linear *linear, int64_t first, int64_t rows, float *sums) {
    _Alignas(64) int32_t tile[CHUNK * TILE_STRIDE];
    int64_t at[CHUNK] = {0}, units = units_of(linear->in);
    const int type = linear->integers.core;
    const int64_t group = linear->integers.group, groups = (linear->in + group - 1) / group;
    const int64_t depth = type == FLOATS ? DEPTH : least(DEPTH, group / UNIT);
    const int32_t *u = linear->u;
    float scales[CHUNK] = {0};
    if (rows % TILE) memset(tile + rows * TILE_STRIDE, 0, sizeof(int32_t) * TILE_STRIDE * (TILE - rows % TILE));
    for (int64_t k = 0; k < units; k += depth) {
        int64_t start = k * UNIT, n = least(depth * UNIT, linear->in - start);
        for (int64_t i = 0; i < rows; i++) {
            const void *values = place(linear->values, (first + i) * linear->stride, type);
            const uint8_t *mask = linear->mask + (first + i) * linear->mask_stride + start / 8;
            int32_t *to = tile + i * TILE_STRIDE;
            __builtin_prefetch(mask + n / 8, 0, L2); /* its values: see struct ahead */
            if (type != FLOATS)
                scales[i] =
                    scale_at((const weight *)linear->integers.core_scales + (first + i) * groups + start / group);
            for (int64_t c = 0; c < n; c += STEP)
                store_vec(to + c / UNIT, next_columns(values, linear->kept, &at[i], mask + c / 8, least(STEP, n - c),
                                                      linear->half, type));
        }
        int64_t done = linear->kept * (start + n) / linear->in;
        const char *next = place((const char *)linear->values + first * linear->row_bytes, done, type);
        if (start + n >= linear->in) next += (rows - 1) * linear->row_bytes;
        multiply_panels(linear, tile, type == FLOATS ? 0 : scales, rows, u + k * LANES, units * LANES, units_of(n), sums,
                        k == 0, (struct ahead){next, linear->row_bytes});
    }
}

#ifdef GATHER
/* Rows of a 2:4 core that are multiplied at once, and the sums of each: as many as panels at most. Groups of columns, of
 * one panel and of all, whose pairs lie in the L1 cache meanwhile. The room of a group's pairs: ten vectors, so that the
 * bits of a mask, less LEAST_MASK, say where its pair stands; four stay empty. */
enum { PAIR_ROWS = 4, CHAINS = 4, PAIR_GROUPS = 64, ALL_GROUPS = 96, PAIR_WORDS = 10 * LANES, LEAST_MASK = 3 };
_Static_assert(CHUNK % PAIR_ROWS == 0, "rows that are multiplied at once must fit a chunk");

/* Rows of a core from some group of columns on, their values as units, and memory that is wanted soon, where `wanted` is
 * not 0: so many bytes of values for each group of PAIR_ROWS rows, and their mask. */
struct core_rows {
    const char *values, *wanted_values;
    const uint8_t *mask, *wanted_mask;
    const weight *scales;                       /* null for floats */
    int64_t stride, mask_stride, scales_stride; /* from row to row; that of the values in bytes */
    int64_t wanted;
};

/* acc += the groups k .. end of PAIR_ROWS rows times their pairs, of `count` <= CHAINS panels: CHAINS sums of a row, so
 * many that one multiply-add need not wait for another. With one or two panels, those of a panel take its groups in
 * turn. A mask that is not 2:4 meets what else is in the room of the pairs. */
static inline __attribute__((always_inline)) void add_pairs(const struct core_rows *core, const int32_t *pairs,
                                                            int64_t k, int64_t end, int count,
                                                            vec acc[PAIR_ROWS][CHAINS]) {
    pairs -= LEAST_MASK * LANES;
    for (; k + 8 <= end; k += 8) {
        __builtin_prefetch(core->wanted_values + k * core->wanted, 0, L2);
        __builtin_prefetch(core->wanted_values + (k + 4) * core->wanted, 0, L2);
        const int32_t *here = pairs + k * count * PAIR_WORDS;
        __asm__("" : "+r"(here)); /* lest the compiler compute each address anew */
        uint64_t next[PAIR_ROWS]; /* the places of eight pairs of a row, the first one lowest */
#pragma GCC unroll 4
        for (int i = 0; i < PAIR_ROWS; i++) next[i] = eight_places(core->mask + i * core->mask_stride + k / 2);
#pragma GCC unroll 2
        for (int half = 0; half < 8; half += 4) {
            vec quad[PAIR_ROWS];
#pragma GCC unroll 4
            for (int i = 0; i < PAIR_ROWS; i++)
                quad[i] = repeat_four((const weight *)(core->values + i * core->stride) + (k + half) * 2);
#pragma GCC unroll 4
            for (int m = 0; m < 4; m++) {
                const int32_t *at = here + (half + m) * count * PAIR_WORDS;
#pragma GCC unroll 4
                for (int i = 0; i < PAIR_ROWS; i++) {
                    const vec w = broadcast_one_of(quad[i], m);
                    const int32_t *pair = at + take_byte(&next[i]);
#pragma GCC unroll 4
                    for (int p = 0; p < count; p++) {
                        vec *to = &acc[i][count * (m % (CHAINS / count)) + p];
                        *to = multiply_add_at(*to, w, pair + p * PAIR_WORDS);
                    }
                }
            }
        }
    }
    for (; k < end; k++)
#pragma GCC unroll 4
        for (int i = 0; i < PAIR_ROWS; i++) {
            const vec w = broadcast((const weight *)(core->values + i * core->stride) + k * 2);
            const int bits = core->mask[i * core->mask_stride + k / 2] >> (k % 2 * 4) & 15;
#pragma GCC unroll 4
            for (int p = 0; p < count; p++)
                acc[i][p] = multiply_add(acc[i][p], w, load_vec(pairs + (k * count + p) * PAIR_WORDS + bits * LANES));
        }
}

/* sums (rows, count * LANES; `stride` from row to row) += `n` groups of rows of the core times the pairs of `count`
 * panels, or begin with them. Integers have a scale for every `scaled` groups; floats 0. PAIR_ROWS rows at a time. */
static inline __attribute__((always_inline)) void multiply_pairs(struct core_rows core, int64_t rows,
                                                                 const int32_t *pairs, int64_t n, int64_t scaled,
                                                                 int count, float *sums, int64_t stride, int begin) {
    const int64_t mask_bytes = core.wanted ? PAIR_ROWS * n / 2 : 0;
    for (int64_t row = 0; row < rows; row += PAIR_ROWS) {
        for (int64_t at = 0; at < mask_bytes; at += 64) __builtin_prefetch(core.wanted_mask + at, 0, L2);
        for (int64_t k = 0, s = 0, step = scaled ? scaled : n; k < n; k += step, s++) {
            const int first = begin && !k;
            vec acc[PAIR_ROWS][CHAINS];
#pragma GCC unroll 4
            for (int i = 0; i < PAIR_ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < CHAINS; j++)
                    acc[i][j] = scaled || first || j >= count ? zero() : load_vec(sums + i * stride + j * LANES);
            add_pairs(&core, pairs, k, least(n, k + step), count, acc);
#pragma GCC unroll 4
            for (int i = 0; i < PAIR_ROWS; i++) {
                const float scale = scaled ? scale_at(core.scales + i * core.scales_stride + s) : 1;
#pragma GCC unroll 4
                for (int p = 0; p < count; p++) {
#pragma GCC unroll 4
                    for (int j = p + count; j < CHAINS; j += count) acc[i][p] = add(acc[i][p], acc[i][j]);
                    const vec before = first || !scaled ? zero() : load_vec(sums + i * stride + p * LANES);
                    if (scaled) acc[i][p] = fused(before, broadcast(&scale), acc[i][p]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < PAIR_ROWS; i++) /* only now, for all may be one row */
#pragma GCC unroll 4
                for (int p = 0; p < count; p++) store_vec(sums + i * stride + p * LANES, acc[i][p]);
        }
        core.values += PAIR_ROWS * core.stride;
        core.mask += PAIR_ROWS * core.mask_stride;
        core.scales += PAIR_ROWS * core.scales_stride;
        core.wanted_values += n * core.wanted;
        core.wanted_mask += mask_bytes;
        sums += PAIR_ROWS * stride;
    }
}

/* Not inlined: where the compiler sees where `pairs` lies, it computes each address anew. */
typedef void pairs_by(struct core_rows, int64_t rows, const int32_t *pairs, int64_t n, int64_t groups, float *sums,
                      int64_t stride, int begin);
#define PAIRS_BY(name, count, scaled)                                                                               \
    static __attribute__((noinline)) void name(struct core_rows core, int64_t rows, const int32_t *pairs, int64_t n, \
                                               int64_t groups, float *sums, int64_t stride, int begin) {            \
        (void)groups;                                                                                               \
        multiply_pairs(core, rows, pairs, n, scaled, count, sums, stride, begin);                                   \
    }
PAIRS_BY(floats_by_one, 1, 0)
PAIRS_BY(floats_by_two, 2, 0)
PAIRS_BY(floats_by_three, 3, 0)
PAIRS_BY(floats_by_four, 4, 0)
PAIRS_BY(integers_by_one, 1, groups)
PAIRS_BY(integers_by_two, 2, groups)
PAIRS_BY(integers_by_three, 3, groups)
PAIRS_BY(integers_by_four, 4, groups)
static pairs_by *const PAIRS[][CHAINS] = {
    {floats_by_one, floats_by_two, floats_by_three, floats_by_four},
    {integers_by_one, integers_by_two, integers_by_three, integers_by_four},
};

/* The pairs of `n` groups of columns from `group` on, of the `count` panels from `panel` on: (n, count, PAIR_WORDS). */
static void lay_pairs(const struct linear *linear, int64_t panel, int count, int64_t group, int64_t n, int32_t *pairs) {
    for (int64_t k = 0; k < n; k++)
        for (int p = 0; p < count; p++, pairs += PAIR_WORDS) {
            const int32_t *u = (const int32_t *)linear->u + ((panel + p) * (linear->in / 4) + group + k) * 2 * LANES;
            store_pairs(pairs, load_vec(u), load_vec(u + LANES));
        }
}

/* `n` groups from `group` on of `rows` rows of integers from `first` on, as units: (rows, 2 * PAIR_GROUPS). */
static void widen_integers(const struct linear *linear, int64_t first, int64_t rows, int64_t group, int64_t n,
                           weight *to) {
    const int type = linear->integers.core;
    for (int64_t i = 0; i < rows; i++, to += 2 * PAIR_GROUPS) {
        const void *values = place(linear->values, (first + i) * linear->stride + group * 2, type);
        for (int64_t v = 0; v < 2 * n; v += STEP)
            store_vec(to + v, load_as(place(values, v, type), least(STEP, 2 * n - v), type));
    }
}

/* sums (rows, panels) = packed rows of a 2:4 core, which stay packed, times the panels: of every group of columns the
 * six pairs lie ready, and each pair of values meets the one that its mask asks for. Half of the multiply-adds. What
 * the next task reads is fetched meanwhile, in the order of memory, which it serves faster than the order of use. */
static void packed_pairs(const struct linear *linear, int64_t first, int64_t rows, float *sums) {
    _Alignas(64) int32_t room[ALL_GROUPS * PAIR_WORDS + 2 * LEAST_MASK * LANES];
    _Alignas(64) weight widened[SPANS * CHUNK * 2 * PAIR_GROUPS];
    int32_t *const pairs = room + LEAST_MASK * LANES;
    const int type = linear->integers.core;
    const int64_t groups = linear->in / 4, panels = linear->panel_count, stride = panels * LANES;
    const int64_t scaled = type == FLOATS ? groups : linear->integers.group / 4; /* groups of columns for a scale */
    const int64_t scales = (groups + scaled - 1) / scaled;                       /* of a row */
    const int64_t all = linear->panels_at_once == CHAINS ? ALL_GROUPS : PAIR_GROUPS;
    /* Not four panels where the columns of a scale, which then need two goes, fit into one with two. */
    const int64_t at_once = least(panels, type == FLOATS || scaled <= all / CHAINS ? linear->panels_at_once : 2);
    const int64_t most = least(PAIR_GROUPS, all / at_once / 8 * 8);
    const int64_t parts = (scaled + most - 1) / most, part = ((scaled + parts - 1) / parts + 7) / 8 * 8;
    const int64_t wanted = PAIR_ROWS * (type == FLOATS ? 4 : type == INT4 ? 1 : 2);
    const int64_t whole = rows / PAIR_ROWS * PAIR_ROWS;
    const char *ahead = (const char *)linear->values + (first + rows) * linear->row_bytes;
    const uint8_t *mask_ahead = linear->mask + (first + rows) * linear->mask_stride;
    for (int64_t g = 0, n; g < groups; g += n) {
        n = least(groups - g, scaled > most ? least(part, scaled - g % scaled) : most / scaled * scaled);
        if (type != FLOATS) widen_integers(linear, first, rows, g, n, widened);
        for (int64_t p = 0, count; p < panels; p += count) {
            count = panels - p == at_once + 1 && at_once > 2 ? at_once - 1 : least(at_once, panels - p);
            lay_pairs(linear, p, count, g, n, pairs);
            struct core_rows core = {
                .values = type == FLOATS ? place(linear->values, first * linear->stride + g * 2, FLOATS) : widened,
                .mask = linear->mask + first * linear->mask_stride + g / 2,
                .scales = scales_of(linear->integers.core_scales, first * scales + g / scaled),
                .stride = type == FLOATS ? linear->row_bytes : (int64_t)sizeof(weight) * 2 * PAIR_GROUPS,
                .mask_stride = linear->mask_stride,
                .scales_stride = type == FLOATS ? 0 : scales,
                .wanted_values = p ? (const char *)pairs : ahead,
                .wanted_mask = p ? (const uint8_t *)pairs : mask_ahead,
                .wanted = p ? 0 : wanted,
            };
            pairs_by *const multiply = PAIRS[type != FLOATS][count - 1];
            float *to = sums + p * LANES;
            multiply(core, whole, pairs, n, scaled, to, stride, g == 0);
            for (int64_t i = whole; i < rows; i++) { /* one row as all of PAIR_ROWS */
                struct core_rows one = core;
                one.values += i * one.stride, one.mask += i * one.mask_stride, one.scales += i * one.scales_stride;
                one.stride = one.mask_stride = one.scales_stride = one.wanted = 0;
                multiply(one, 1, pairs, n, scaled, to + i * stride, 0, g == 0);
            }
        }
        ahead += rows / PAIR_ROWS * n * wanted;
        mask_ahead += rows * n / 2;
    }
}
#endif

/* `rows` rows of sums become units of panels, from unit `unit` on. */
static void emit_panels(const struct linear *linear, const float *sums, int64_t rows, int32_t *panel,
                        int64_t panel_stride) {
    int64_t stride = linear->panel_count * LANES;
    for (int64_t p = 0; p < linear->panel_count; p++)
        for (int64_t i = 0; i < rows; i += UNIT) {
            const float *from = sums + i * stride + p * LANES;
            vec odd = UNIT == 2 && i + 1 < rows ? load_vec(from + stride) : zero();
            store_vec(panel + p * panel_stride + i / UNIT * LANES, to_units(load_vec(from), odd));
        }
}

/* `rows` rows of sums become columns first .. first + rows of y, with the bias. */
static void emit_transposed(const struct linear *linear, const float *sums, int64_t rows, int64_t first) {
    const int64_t stride = linear->panel_count * LANES;
    const weight *bias = linear->bias ? (const weight *)linear->bias + first : 0;
    for (int64_t i = 0; i < rows; i += STEP)
        for (int64_t p = 0; p < linear->panel_count; p++) {
            vec v[LANES];
            for (int64_t l = 0; l < LANES; l++) {
                vec unit[2] = {zero(), zero()};
                for (int64_t j = 0; j < UNIT; j++) {
                    const int64_t row = i + l * UNIT + j;
                    if (row >= rows) continue;
                    const float f = bias ? scale_at(bias + row) : 0;
                    unit[j] = add(load_vec(sums + row * stride + p * LANES), broadcast(&f));
                }
                v[l] = to_units(unit[0], unit[1]);
            }
            transpose(v);
            weight *y = (weight *)linear->y + p * LANES * linear->y_stride + first + i;
            for (int64_t r = 0; r < least(LANES, linear->rows - p * LANES); r++)
                store_weights(y + r * linear->y_stride, v[r], least(STEP, rows - i));
        }
}

static void NAME(right_panel)(struct linear *linear, int64_t task) {
    _Alignas(64) float sums[CHUNK * WAVE];
    struct span span = span_of(&linear->right_cut, task);
    int64_t d = linear->right_cut.size, stride = units_of(linear->in) * LANES;
    for (int64_t b = span.block; b < span.block + span.blocks; b++) {
        const void *weights = place(linear->right, (b * d + span.row) * d, linear->integers.blocks);
        const weight *scales = scales_of(linear->integers.right_scales, b * d + span.row);
        const int32_t *panel = (int32_t *)linear->packed + b * d / UNIT * LANES;
        dense_panels(linear, weights, scales, span.rows, d, panel, stride, sums);
        emit_panels(linear, sums, span.rows, (int32_t *)linear->u + (b * d + span.row) / UNIT * LANES, stride);
    }
    if (linear->behind) NAME(right_dot)(linear->behind, task);
}

static void NAME(core_panel)(struct linear *linear, int64_t task) {
    _Alignas(64) float sums[(CAN_GATHER ? SPANS : 1) * CHUNK * WAVE];
    const int64_t d = linear->core_cut.size, units = units_of(d), start = task * linear->spans;
    const int64_t end = least(start + linear->spans, linear->core_cut.tasks);
    const int64_t first = first_row(&linear->core_cut, start), rows = first_row(&linear->core_cut, end) - first;
    /* First the rows behind the panels: what was fetched ahead is in the L2 cache, and the panels find it there too. */
    for (int64_t row = 0; linear->behind && row < rows; row += 2 * CHUNK) {
        const int64_t both = least(2 * CHUNK, rows - row), from[2] = {first + row, first + row + (both + 1) / 2};
        core_rows_dot(linear->behind, from, (const int64_t[2]){(both + 1) / 2, both / 2});
    }
#ifdef GATHER
    if (linear->two_of_four)
        packed_pairs(linear, first, rows, sums);
    else
#endif
        packed_panels(linear, first, rows, sums);
    if (!linear->left) {
        emit_transposed(linear, sums, rows, first);
        return;
    }
    for (int64_t t = start; t < end; t++) {
        const struct span span = span_of(&linear->core_cut, t);
        for (int64_t b = span.block; b < span.block + span.blocks; b++)
            emit_panels(linear, sums + (b * d + span.row - first) * linear->panel_count * LANES, span.rows,
                        (int32_t *)linear->z + (b * units + span.row / UNIT) * LANES,
                        linear->left_cut.count * units * LANES);
    }
}

static void NAME(left_panel)(struct linear *linear, int64_t task) {
    _Alignas(64) float sums[CHUNK * WAVE];
    struct span span = span_of(&linear->left_cut, task);
    int64_t d = linear->left_cut.size, units = units_of(d), stride = linear->left_cut.count * units * LANES;
    for (int64_t b = span.block; b < span.block + span.blocks; b++) {
        const void *weights = place(linear->left, (b * d + span.row) * d, linear->integers.blocks);
        const weight *scales = scales_of(linear->integers.left_scales, b * d + span.row);
        dense_panels(linear, weights, scales, span.rows, d, (int32_t *)linear->z + b * units * LANES, stride, sums);
        emit_transposed(linear, sums, span.rows, b * d + span.row);
    }
    if (linear->behind) NAME(left_dot)(linear->behind, task);
}

/* ---- the core as a dense matrix, for a matrix product that is faster than these loops ---- */

static void NAME(unpack)(const void *values, const uint8_t *mask, int64_t rows, int64_t in, int64_t kept,
                         int64_t mask_stride, void *dense) {
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = 0;
        for (int64_t c = 0; c < in; c += STEP) {
            int64_t n = least(STEP, in - c);
            vec w = next_columns((const weight *)values + i * kept, kept, &at, mask + i * mask_stride + c / 8, n, 0, FLOATS);
            store_weights((weight *)dense + i * in + c, w, n);
        }
    }
}

const struct kernel NAME(armor) = {
    .lanes = LANES,
    .unit = UNIT,
    .element = sizeof(element),
    .weight = sizeof(weight),
    .dot_rows = DOT_ROWS,
    .quad_rows = CAN_GATHER ? QUAD_ROWS : 0,
    .spans = CAN_GATHER ? SPANS : 1,
    .convert = NAME(convert),
    .pack = NAME(pack),
    .right_dot = NAME(right_dot),
    .core_dot = NAME(core_dot),
    .left_dot = NAME(left_dot),
    .right_panel = NAME(right_panel),
    .core_panel = NAME(core_panel),
    .left_panel = NAME(left_panel),
    .unpack = NAME(unpack),
};
