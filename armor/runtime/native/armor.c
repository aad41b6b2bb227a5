/* The door of the library: choose the kernel, cut the linear into tasks, let the caller's OpenMP threads take them.
 *
 * Nothing here links to OpenMP. The library that called us (torch) brings its own, and its GOMP_parallel, which GNU's,
 * LLVM's and Intel's runtimes all have, is handed in: so both share one set of threads, and no second set spins beside
 * it. Every thread goes through the steps in order: pack, right, core, left. It takes tasks of a step until none is
 * left, then waits for what the next step needs. All that is waited for is being done by a thread that runs, so any
 * number of threads gets to the end, one included. Where x has waves of rows for all threads, each takes whole ones.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "linear.h"

uint8_t armor_spread_index[256][8];

/* Raise it with every change of what Python calls here, so that it takes no library of another release. */
enum { INTERFACE = 3 };

int armor_interface(void) { return INTERFACE; }

enum level { PORTABLE, AVX2, AVX512, AVX512_BF16, LEVELS };

static const struct kernel *const KERNELS[LEVELS][2] = {
    [PORTABLE] = {&armor_portable_f32, &armor_portable_bf16},
#ifdef __x86_64__
    [AVX2] = {&armor_avx2_f32, &armor_avx2_bf16},
    [AVX512] = {&armor_avx512_f32, &armor_avx512_bf16},
    [AVX512_BF16] = {&armor_avx512_f32, &armor_avx512bf16_bf16},
#endif
};

/* Panels whose pairs are multiplied together: four want 36 KB of L1 cache, two 24. */
static int panels_at_once = 2;

/* Prepare the tables and return the best level of this processor. Call it once, before anything else. */
int armor_initialize(void) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    if (sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10) panels_at_once = 4;
#endif
    for (int bits = 0; bits < 256; bits++)
        for (int column = 0, rank = 0; column < 8; column++)
            armor_spread_index[bits][column] = bits >> column & 1 ? rank++ : 128;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return PORTABLE;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    int bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2");
    return bf16 ? AVX512_BF16 : AVX512;
#else
    return PORTABLE;
#endif
}

static struct cut cut_of(int64_t dimension, int64_t size) {
    struct cut cut = {.size = size, .count = dimension / size, .per_block = 1, .blocks = 1};
    if (size >= CHUNK) {
        cut.per_block = (size + CHUNK - 1) / CHUNK;
        cut.tasks = cut.count * cut.per_block;
    } else {
        cut.blocks = CHUNK / size;
        cut.tasks = (cut.count + cut.blocks - 1) / cut.blocks;
    }
    return cut;
}

/* A step's tasks in contiguous ranges, one for each thread, so that each reads memory in one go; a thread that is done
 * with its own range helps with the others. */
struct range {
    atomic_llong next;
    int64_t end;
    char apart[48]; /* a cache line each, so that threads do not pass one around */
};

struct step {
    void (*task)(struct linear *, int64_t task);
    int64_t first[PARTS + 1]; /* the first task of each linear; the last entry is the number of all tasks */
    atomic_llong finished;
    struct range *ranges;
};

enum { PACK, RIGHT, CORE, LEFT, STEPS };

struct work {
    struct linear linears[PARTS], behind[PARTS];
    atomic_llong *finished_in_block[PARTS]; /* of the core, for `left`: by block, or by task if a task holds several */
    struct step steps[STEPS];
    atomic_int workers;
    int count, threads, dot;
};

static int64_t tasks_of(const struct work *work, int step) { return work->steps[step].first[work->count]; }

/* The first task of a thread's range in a step; of the thread after the last one: the number of tasks. */
static int64_t first_task(const struct work *work, int step, int64_t thread) {
    return tasks_of(work, step) * thread / work->threads;
}

static void wait_for(atomic_llong *counter, int64_t value) {
    int spins = 1000; /* a few microseconds; a thread that waits longer lets others run */
    while (atomic_load_explicit(counter, memory_order_acquire) < value)
        if (spins)
            spins--;
        else
            sched_yield();
}

static void finish(atomic_llong *counter) { atomic_fetch_add_explicit(counter, 1, memory_order_release); }

/* Before task `task` of the step `right`: its share of the first core task of its thread, which nothing has fetched.
 * The others are fetched by the core task before them. */
static void fetch_core(const struct work *work, int64_t task) {
    const int64_t thread = ((task + 1) * work->threads - 1) / tasks_of(work, RIGHT); /* in whose range it is */
    const int64_t start = first_task(work, RIGHT, thread), end = first_task(work, RIGHT, thread + 1);
    int64_t core = first_task(work, CORE, thread);
    if (core == first_task(work, CORE, thread + 1)) return;
    int part = 0;
    while (core >= work->steps[CORE].first[part + 1]) part++;
    core -= work->steps[CORE].first[part];
    const struct linear *linear = &work->linears[part];
    const struct cut *cut = &linear->core_cut;
    const int64_t row = first_row(cut, core * linear->spans);
    const int64_t rows = first_row(cut, least(cut->tasks, (core + 1) * linear->spans)) - row;
    const int64_t from = row + rows * (task - start) / (end - start);
    const int64_t to = row + rows * (task + 1 - start) / (end - start);
    const char *values = linear->values, *mask = (const char *)linear->mask;
    for (int64_t at = from * linear->row_bytes; at < to * linear->row_bytes; at += 64)
        __builtin_prefetch(values + at, 0, 2);
    for (int64_t at = from * linear->mask_stride; at < to * linear->mask_stride; at += 64)
        __builtin_prefetch(mask + at, 0, 2);
}

static void do_task(struct work *work, int s, int64_t task) {
    struct step *step = &work->steps[s];
    if (s == RIGHT && !work->dot) fetch_core(work, task);
    int part = 0;
    while (task >= step->first[part + 1]) part++;
    struct linear *linear = &work->linears[part];
    atomic_llong *finished = work->finished_in_block[part];
    int64_t tasks = step->first[part + 1] - step->first[part];
    task -= step->first[part];
    if (s == LEFT) wait_for(&finished[task / linear->left_cut.per_block], linear->left_cut.per_block);
    step->task(linear, task);
    for (int64_t i = 0; s == CORE && i < linear->spans; i++) {
        const int64_t t = work->dot ? task + i * tasks : task * linear->spans + i;
        if (t < linear->core_cut.tasks) finish(&finished[t / linear->core_cut.per_block]);
    }
    finish(&step->finished);
}

static void take_tasks(void *argument) {
    struct work *work = argument;
    int self = atomic_fetch_add(&work->workers, 1);
    for (int s = PACK; s < STEPS; s++) {
        struct step *step = &work->steps[s];
        if (s == RIGHT || s == CORE) wait_for(&step[-1].finished, tasks_of(work, s - 1));
        for (int r = 0; r < work->threads && tasks_of(work, s); r++) {
            struct range *range = &step->ranges[(self + r) % work->threads];
            int64_t task;
            while ((task = atomic_fetch_add_explicit(&range->next, 1, memory_order_relaxed)) < range->end)
                do_task(work, s, task);
        }
    }
}

static void run(struct work *work, parallel_function parallel) {
    for (int i = 0; i < work->count; i++) {
        const struct cut *cut = &work->linears[i].core_cut;
        for (int64_t b = 0; b < cut->tasks / cut->per_block; b++) atomic_init(&work->finished_in_block[i][b], 0);
    }
    for (int s = PACK; s < STEPS; s++) {
        struct step *step = &work->steps[s];
        atomic_init(&step->finished, 0);
        for (int r = 0; r < work->threads; r++) {
            atomic_init(&step->ranges[r].next, first_task(work, s, r));
            step->ranges[r].end = first_task(work, s, r + 1);
        }
    }
    atomic_init(&work->workers, 0);
    if (parallel && work->threads > 1)
        parallel(take_tasks, work, work->threads, 0);
    else
        take_tasks(work);
}

static const struct kernel *kernel_for(int level, int type, int64_t right_size) {
    const struct kernel *kernel = KERNELS[level][type];
    /* A block of an odd size would end in the middle of a pair of columns. */
    return kernel->unit == 2 && right_size % 2 ? KERNELS[level - 1][type] : kernel;
}

static int is_two_of_four(const struct part *part, int64_t in) { return part->kept * 2 == in && part->group == 4; }

static struct linear linear_of(const struct part *part, int64_t in, const struct kernel *kernel) {
    struct linear linear = {
        .values = part->values,
        .left = part->left,
        .right = part->right,
        .bias = part->bias,
        .mask = part->mask,
        .in = in,
        .out = part->out,
        .kept = part->kept,
        .mask_stride = (in + 7) / 8,
        .y_stride = part->y_stride,
        .half = part->kept * 2 == in && kernel->lanes * kernel->unit % part->group == 0,
        .two_of_four = is_two_of_four(part, in),
        .stride = part->kept,
        .integers.group = in,
    };
    if (part->integers) linear.integers = *part->integers;
    const int type = linear.integers.core;
    if (type == INT4) linear.stride = (part->kept + 1) / 2 * 2;
    linear.row_bytes = type == FLOATS ? linear.stride * kernel->weight
                       : type != INT4 ? linear.stride
                                      : linear.stride / 2;
    linear.left_cut = linear.core_cut = cut_of(part->out, part->left ? part->left_size : part->out);
    linear.right_cut = cut_of(in, part->right ? part->right_size : in);
    return linear;
}

/* How many chunks of a 2:4 core one task of the panel way takes, so that `threads` are done soonest. For each task
 * pairs are laid out, which takes as long as a third of a chunk; no sum depends on it. What the next task reads is
 * fetched meanwhile, and where panels are few it shall still be in the L2 cache then: at most 1 MB, or with one panel
 * and a core in floats half as much, beside as much of this task. A thread's first task waits for memory. */
static int64_t spans_of(const struct linear *linear, const struct kernel *kernel, int64_t panels, int64_t threads) {
    const int64_t row = linear->mask_stride + linear->row_bytes;
    const int64_t bytes = panels == 1 && linear->integers.core == FLOATS ? 1 << 19 : 1 << 20;
    const int64_t fit = bytes / (CHUNK * row);
    const int64_t most = panels < 16 && fit < kernel->spans ? fit : kernel->spans;
    const int64_t tasks = linear->core_cut.tasks;
    int64_t best = 1, least_time = INT64_MAX;
    for (int64_t spans = 1; spans <= most; spans++) {
        const int64_t rounds = ((tasks + spans - 1) / spans + threads - 1) / threads;
        const int64_t time = panels * rounds * (3 * spans + 1) + (panels < 4 ? panels : 4) * 3 * spans;
        if (time < least_time) best = spans, least_time = time;
    }
    return best;
}

/* Whether the dot way takes four rows of a linear at once: of 2:4 in floats, from five rows of x on. With fewer the
 * turns of the weights cost more than they save. */
static int by_quads(const struct kernel *kernel, const struct part *part, int64_t rows, int64_t in) {
    return rows > 4 && rows <= kernel->quad_rows && !part->integers && is_two_of_four(part, in);
}

/* Whether the dot way takes x in pieces: two to four rows, of 2:4 in floats, that do not stay in 48 KB of L1 cache
 * while weights pass through it. */
static int by_pieces(const struct kernel *kernel, const struct part *part, int64_t rows, int64_t in) {
    return kernel->quad_rows && panels_at_once == 4 && rows > 1 && rows <= 4 &&
           rows * in * kernel->element > 40 << 10 && !part->integers && is_two_of_four(part, in);
}

/* Whether a linear takes the dot way. Beyond dot_rows only by quads, and only on processors with 48 KB of L1 cache: Zen
 * 5 shuffles two vectors a cycle, as many as it multiplies. Zen 4 has 32 KB and shuffles one, which by count is no
 * faster than pairs that lie ready in the cache. */
static int by_dot(const struct kernel *kernel, const struct part *part, int64_t rows, int64_t in) {
    return rows <= kernel->dot_rows || (panels_at_once == 4 && by_quads(kernel, part, rows, in));
}

static size_t take(size_t *total, size_t bytes) {
    size_t offset = *total;
    *total += (bytes + 63) / 64 * 64;
    return offset;
}

/* Multiply x with `count` linears, all by `kernel`: `rows` rows in the dot way or the panel way, and the `rest` behind
 * them in the dot way, within the tasks of the last wave of panels. 0, or an errno. */
static int multiply(const struct kernel *kernel, const char *x, int64_t rows, int64_t rest, int64_t in,
                    const struct part *parts, int count, int dot, parallel_function parallel, int threads) {
    int64_t wave = rows < WAVE ? rows : WAVE, work_items = 0;
    int64_t panels = (wave + kernel->lanes - 1) / kernel->lanes, lane_bytes = panels * kernel->lanes * 4;
    int bare = 0; /* whether a linear meets x itself */
    for (int i = 0; i < count; i++) bare |= !parts[i].right;
    const int converts = bare && kernel->element != kernel->weight, packs = !dot || converts;
    const int64_t row_bytes = in * kernel->element;
    const int64_t u_bytes = dot ? wave * row_bytes : (in + kernel->unit - 1) / kernel->unit * lane_bytes;
    const size_t all_bytes = u_bytes + rest * row_bytes;
    struct work work = {.count = count, .dot = dot};
    size_t total = 0, counters[PARTS], u[PARTS], z[PARTS], z_behind[PARTS];
    const size_t packed = take(&total, packs ? all_bytes : 0);
    for (int i = 0; i < count; i++) {
        const struct part *part = &parts[i];
        struct linear *linear = &work.linears[i];
        *linear = linear_of(part, in, kernel);
        linear->panels_at_once = panels_at_once;
        linear->quads = dot && by_quads(kernel, part, rows, in);
        linear->pieces = dot && by_pieces(kernel, part, rows, in);
        linear->spans = dot ? 2 : linear->two_of_four ? spans_of(linear, kernel, panels, threads) : 1;
        int same = 0; /* the first linear with this `right` */
        while (parts[same].right != part->right) same++;
        u[i] = !part->right ? packed : same == i ? take(&total, all_bytes) : u[same];
        int64_t block_units = (linear->left_cut.size + kernel->unit - 1) / kernel->unit;
        size_t z_bytes = dot ? wave * part->out * kernel->element : linear->left_cut.count * block_units * lane_bytes;
        z[i] = take(&total, part->left ? z_bytes : 0);
        z_behind[i] = take(&total, part->left ? rest * part->out * kernel->element : 0);
        counters[i] = take(&total, linear->core_cut.tasks * sizeof(atomic_llong));
        int64_t tasks[STEPS] = {
            [RIGHT] = part->right && same == i ? linear->right_cut.tasks : 0,
            [CORE] = (linear->core_cut.tasks + linear->spans - 1) / linear->spans,
            [LEFT] = part->left ? linear->left_cut.tasks : 0,
        };
        for (int s = RIGHT; s < STEPS; s++) work.steps[s].first[i + 1] = work.steps[s].first[i] + tasks[s];
        work_items += (part->kept * part->out + part->left_size * part->out + part->right_size * in) * (rows + rest);
    }
    /* Starting the threads costs as much as this many multiply-adds. */
    work.threads = work_items < 1 << 18 ? 1 : threads;
    size_t ranges = take(&total, STEPS * work.threads * sizeof(struct range));
    char *scratch = aligned_alloc(64, total);
    if (!scratch) return ENOMEM;
    for (int s = PACK; s < STEPS; s++) work.steps[s].ranges = (struct range *)(scratch + ranges) + s * work.threads;
    work.steps[PACK].task = dot ? kernel->convert : kernel->pack;
    work.steps[RIGHT].task = dot ? kernel->right_dot : kernel->right_panel;
    work.steps[CORE].task = dot ? kernel->core_dot : kernel->core_panel;
    work.steps[LEFT].task = dot ? kernel->left_dot : kernel->left_panel;

    for (int64_t start = 0; start < rows; start += wave) {
        for (int i = 0; i < count; i++) {
            struct linear *linear = &work.linears[i], *behind = &work.behind[i];
            linear->rows = least(wave, rows - start);
            linear->x = x + start * in * kernel->weight;
            linear->y = (char *)parts[i].y + start * parts[i].y_stride * kernel->weight;
            linear->panel_count = (linear->rows + kernel->lanes - 1) / kernel->lanes;
            linear->packed = scratch + packed;
            linear->u = dot && !linear->right && !packs ? (void *)linear->x : scratch + u[i];
            linear->z = scratch + z[i];
            if (rest && start + wave >= rows) {
                *behind = *linear;
                behind->rows = rest;
                behind->quads = by_quads(kernel, parts + i, rest, in);
                behind->pieces = by_pieces(kernel, parts + i, rest, in);
                behind->x = x + rows * in * kernel->weight;
                behind->y = (char *)parts[i].y + rows * parts[i].y_stride * kernel->weight;
                behind->packed = converts ? scratch + packed + u_bytes : NULL;
                behind->u = !linear->right && !converts ? (void *)behind->x : scratch + u[i] + u_bytes;
                behind->z = scratch + z_behind[i];
                linear->behind = behind;
            }
            work.finished_in_block[i] = (atomic_llong *)(scratch + counters[i]);
            const int64_t tasks = dot ? 1 : linear->panel_count * ((in + PACK_COLUMNS - 1) / PACK_COLUMNS);
            work.steps[PACK].first[i + 1] = packs ? tasks : 0; /* by the first linear, for all */
        }
        run(&work, parallel);
    }
    free(scratch);
    return 0;
}

/* The waves of x, of which a thread takes whole ones. */
struct waves {
    const struct kernel *kernel;
    const char *x;
    const struct part *parts;
    int64_t rows, rest, in;
    int count;
    atomic_llong next;
    atomic_int error;
};

static void take_waves(void *argument) {
    struct waves *work = argument;
    const int64_t weight = work->kernel->weight;
    int64_t start;
    int error;
    while ((start = atomic_fetch_add(&work->next, 1) * WAVE) < work->rows) {
        struct part own[PARTS]; /* for the rows of x from `start` on */
        for (int i = 0; i < work->count; i++) {
            own[i] = work->parts[i];
            own[i].y = (char *)own[i].y + start * own[i].y_stride * weight;
        }
        const int64_t rows = least(WAVE, work->rows - start);
        error = multiply(work->kernel, work->x + start * work->in * weight, rows,
                         start + rows < work->rows ? 0 : work->rest, work->in, own, work->count, 0, NULL, 1);
        if (error) atomic_store(&work->error, error);
    }
}

/* Multiply x with `count` linears, at most PARTS; 0, or an errno. A sum is the same whatever others there are. */
int armor_linears(int level, int type, const void *x, int64_t rows, int64_t in, const struct part *parts, int count,
                  parallel_function parallel, int threads) {
    const struct kernel *kernel = kernel_for(level, type, parts[0].right ? parts[0].right_size : 0);
    int64_t rest = rows > kernel->lanes ? rows % kernel->lanes : 0; /* rows behind full panels */
    const int dot = by_dot(kernel, parts, rows, in), rest_dot = by_dot(kernel, parts, rest, in);
    for (int i = 1; i < count; i++)
        if (kernel_for(level, type, parts[i].right ? parts[i].right_size : 0) != kernel ||
            by_dot(kernel, parts + i, rows, in) != dot || by_dot(kernel, parts + i, rest, in) != rest_dot) {
            /* Their panels differ, or one has none: one after the other. */
            int error = 0;
            for (int j = 0; j < count && !error; j++)
                error = armor_linears(level, type, x, rows, in, parts + j, 1, parallel, threads);
            return error;
        }
    if (!rest_dot) rest = 0; /* else one more panel would take longer */
    rows -= rest;
    const int64_t waves = (rows + WAVE - 1) / WAVE;
    if (!parallel || threads < 2 || (waves < 4 * threads && waves % threads))
        return multiply(kernel, x, rows, rest, in, parts, count, dot, parallel, threads);
    /* Threads that need not wait for each other are quicker, and each lays its pairs for more rows of the core. */
    struct waves work = {kernel, x, parts, rows, rest, in, count, 0, 0};
    parallel(take_waves, &work, threads, 0);
    return atomic_load(&work.error);
}

/* Linears, at most PARTS, and the x (rows, in) that they are multiplied with. */
struct product {
    const void *x;
    const struct part *parts;
    int64_t rows, in, count;
};

struct products {
    const struct product *all;
    int level, type, count;
    atomic_int next, error;
};

static int multiply_product(const struct products *work, int i, parallel_function parallel, int threads) {
    const struct product *own = &work->all[i];
    return armor_linears(work->level, work->type, own->x, own->rows, own->in, own->parts, (int)own->count, parallel,
                         threads);
}

static void take_products(void *argument) {
    struct products *work = argument;
    int i, error;
    while ((i = atomic_fetch_add(&work->next, 1)) < work->count)
        if ((error = multiply_product(work, i, NULL, 1))) atomic_store(&work->error, error);
}

/* Multiply `count` times; 0, or an errno. With as many products as threads or more a thread takes whole ones: it never
 * waits for another but at the end. Fewer are shared out one after the other. */
int armor_products(int level, int type, const struct product *all, int count, parallel_function parallel, int threads) {
    struct products work = {.all = all, .level = level, .type = type, .count = count};
    if (parallel && threads > 1 && count >= threads) {
        parallel(take_products, &work, threads, 0);
        return atomic_load(&work.error);
    }
    int error = 0;
    for (int i = 0; i < count && !error; i++) error = multiply_product(&work, i, parallel, threads);
    return error;
}

struct unpacking {
    const struct kernel *kernel;
    const char *values, *mask;
    char *dense;
    int64_t rows, in, kept;
    atomic_llong next;
};

static void take_rows(void *argument) {
    struct unpacking *work = argument;
    int64_t row, stride = (work->in + 7) / 8, weight = work->kernel->weight;
    while ((row = atomic_fetch_add(&work->next, CHUNK)) < work->rows)
        work->kernel->unpack(work->values + row * work->kept * weight, (const uint8_t *)work->mask + row * stride,
                             work->rows - row < CHUNK ? work->rows - row : CHUNK, work->in, work->kept, stride,
                             work->dense + row * work->in * weight);
}

/* dense (rows, in) = the rows of a core that `values` (rows, kept) and `mask` (rows, ceil(in / 8)) hold. */
void armor_unpack(int level, int type, const void *values, const void *mask, void *dense, int64_t rows, int64_t in,
                  int64_t kept, parallel_function parallel, int threads) {
    struct unpacking work = {KERNELS[level][type], values, mask, dense, rows, in, kept, 0};
    if (parallel && threads > 1)
        parallel(take_rows, &work, threads, 0);
    else
        take_rows(&work);
}

/* Whether the processor multiplies bf16 tiles (AMX), which torch's matrix products use and these loops do not. */
int armor_has_tiles(void) {
#ifdef __x86_64__
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1;
#else
    return 0;
#endif
}
