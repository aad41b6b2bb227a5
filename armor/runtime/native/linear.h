/* One ARMOR linear, y = A (S (B x)) + bias, cut into tasks for any number of threads.
 *
 * A `struct linear` says what is computed, a `struct kernel` has the loops of one processor level and one weight type.
 * The loops are written once, in loops.h, over a few vector primitives; each level's file supplies those primitives.
 */
#ifndef ARMOR_LINEAR_H
#define ARMOR_LINEAR_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum {
    CHUNK = 32,         /* weight rows in a task: enough to hide taking it, few enough to balance the threads */
    WAVE = 256,         /* rows of x that are multiplied at once; more are taken in waves, to bound the scratch */
    DEPTH = 256,        /* 32-bit units of a weight row that are unpacked at once: 32 of them fit the L2 cache */
    PACK_COLUMNS = 1024, /* columns of x that one task brings into panels */
    SPANS = 9,           /* chunks at most of a 2:4 core that one task of the panel way takes */
    PARTS = 8            /* linears at most that are multiplied in one pass over x */
};

/* The cut of `count` diagonal blocks of `size` rows into tasks of at most CHUNK rows. */
struct cut {
    int64_t size, count;
    int64_t per_block; /* tasks of a block, if a block fills a task; else 1 */
    int64_t blocks;    /* blocks of a task, if a task holds several; else 1 */
    int64_t tasks;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct span {
    int64_t block, row, rows, blocks; /* rows row .. row + rows of each of `blocks` blocks from `block` on */
};

static inline struct span span_of(const struct cut *cut, int64_t task) {
    if (cut->blocks > 1) {
        int64_t block = task * cut->blocks;
        return (struct span){block, 0, cut->size, least(cut->blocks, cut->count - block)};
    }
    int64_t row = task % cut->per_block * CHUNK;
    return (struct span){task / cut->per_block, row, least(CHUNK, cut->size - row), 1};
}

/* The row of the linear that a task starts with; of the task after the last one: the number of rows. */
static inline int64_t first_row(const struct cut *cut, int64_t task) {
    if (task == cut->tasks) return cut->count * cut->size;
    const struct span span = span_of(cut, task);
    return span.block * cut->size + span.row;
}

enum type { F32, BF16 }; /* of x and y, and of what is not stored as integers */

/* What the numbers of a matrix are stored as. */
enum numbers { FLOATS, INT8, INT4, FP8 };

/* The numbers of a linear that have scales: of the core one for every `group` columns of a row, of a block one for each
 * row. Scales are of the type of x. Null stands for a linear in floats. */
struct integers {
    int core, blocks;
    const void *core_scales, *left_scales, *right_scales;
    int64_t group;
};

/* A linear as it is handed in: y (rows, out) = left (core (right x)) + bias for x (rows, in), x, y and bias of `type`.
 * values (out, kept), mask (out, ceil(in / 8)), left (out / left_size, left_size, left_size) or null, right likewise,
 * bias (out) or null. y has `y_stride` numbers from a row to the next. `group`: in every `group` consecutive columns of
 * a row the core keeps kept * group / in. Linears with the same `right` share right x.
 * `integers` says which of values, left and right are not of `type`; null: none. Its group is a multiple of 32, and one
 * of 512 if it is larger; int4 values are for cores that keep half of every 8 columns. */
struct part {
    const void *values, *mask, *left, *right, *bias;
    void *y;
    const struct integers *integers;
    int64_t out, kept, group, left_size, right_size, y_stride;
};

typedef void (*parallel_function)(void (*)(void *), void *, unsigned threads, unsigned flags); /* GOMP_parallel */

int armor_linears(int level, int type, const void *x, int64_t rows, int64_t in, const struct part *parts, int count,
                  parallel_function parallel, int threads);

struct linear {
    struct integers integers;
    const void *x, *values, *left, *right, *bias; /* left, right and bias may be null */
    const uint8_t *mask;                          /* (out, mask_stride) bytes, least significant bit first */
    void *y;                                      /* (rows, out), `y_stride` numbers from a row to the next */
    int64_t rows, in, out, kept, mask_stride;     /* kept: values in a row of the core */
    int64_t stride, row_bytes;                    /* from a row of the core to the next: values, and their bytes */
    int64_t y_stride;
    int half;                                     /* every vector step of a row keeps exactly half of its columns */
    int two_of_four;
    int quads;  /* the dot way takes four rows of the core at once */
    int pieces; /* it takes x in pieces that the L1 cache holds */
    struct cut right_cut, core_cut, left_cut;
    int64_t spans; /* tasks of core_cut that one takes: of the panel way in a row; of the dot way 2, from either half */

    /* In the kernel's own type: x (rows, in; null where it need not be brought into that type), B x (rows, in) and S B x
     * (rows, out), or panels of them. */
    void *packed, *u, *z;
    int64_t panel_count;
    struct linear *behind; /* this linear with the rows of x behind full panels, which take the dot way; or null */
    int panels_at_once; /* 2 or 4: those whose pairs lie in the L1 cache together */
};

struct kernel {
    int lanes;    /* rows of x in a panel */
    int unit;     /* columns in a 32-bit unit: 2 for pairs of bf16, 1 for fp32 */
    int element;  /* bytes of a number in u and z */
    int weight;   /* bytes of a weight */
    int spans;    /* chunks of a 2:4 core that a task of the panel way may take */
    int dot_rows;  /* up to this many rows of x take the dot way */
    int quad_rows; /* up to this many can be taken by quads; 0: none, and no x in pieces */
    void (*convert)(struct linear *, int64_t task);
    void (*pack)(struct linear *, int64_t task);
    void (*right_dot)(struct linear *, int64_t task);
    void (*core_dot)(struct linear *, int64_t task);
    void (*left_dot)(struct linear *, int64_t task);
    void (*right_panel)(struct linear *, int64_t task);
    void (*core_panel)(struct linear *, int64_t task);
    void (*left_panel)(struct linear *, int64_t task);
    void (*unpack)(const void *values, const uint8_t *mask, int64_t rows, int64_t in, int64_t kept, int64_t mask_stride,
                   void *dense);
};

extern const struct kernel armor_portable_bf16, armor_portable_f32;
#ifdef __x86_64__
extern const struct kernel armor_avx2_bf16, armor_avx2_f32;
extern const struct kernel armor_avx512_bf16, armor_avx512_f32;
extern const struct kernel armor_avx512bf16_bf16;
#endif

/* spread_index[bits][l]: which of the packed values column l takes, or 128 where bit l is clear. */
extern uint8_t armor_spread_index[256][8];

#endif
