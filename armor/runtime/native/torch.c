/* The operator armor::cpu_linears, as torch's dispatcher calls it: without Python, and without a header of torch.
 *
 * torch has an interface in C for operators of other libraries that stays the same from release to release
 * (torch/csrc/stable/library.h): an operator finds its arguments as 64-bit words, tensors as handles that it must give
 * back, and leaves its result there. What is called here of torch is handed in as pointers, as OpenMP's is.
 */
#include <stdbool.h>

#include "linear.h"

struct tensor; /* torch's */

/* torch's functions, by their names behind aoti_torch_ and torch_. Each returns 0 if it did what it should, but `check`,
 * which throws an exception with its message unless the condition holds. And what armor_linears is called with. */
struct torch {
    int (*get_data_ptr)(struct tensor *, void **);
    int (*get_dim)(struct tensor *, int64_t *);
    int (*get_sizes)(struct tensor *, int64_t **);
    int (*get_strides)(struct tensor *, int64_t **);
    int (*get_dtype)(struct tensor *, int32_t *);
    int (*empty_strided)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type,
                         int32_t device, struct tensor **);
    int (*delete_tensor_object)(struct tensor *);
    int (*get_num_threads)(uint32_t *);
    void (*check)(bool holds, const char *function, const char *file, uint32_t line, const char *message);
    parallel_function parallel;
    int level, cpu; /* the number of that device */
};

static struct torch torch;

void armor_use_torch(const struct torch *given) { torch = *given; }

/* The bytes of the tensor `table`: linears for x of `columns` columns, of our `type`, which is number `number` to torch.
 * The first `filled` parts are set, but for their `y`. */
struct table {
    int64_t type, number, columns, filled;
    struct part parts[PARTS];
};

enum { DIMENSIONS = 16 };

/* y is x times the linears of `held`, side by side; null, or what is wrong. */
static const char *multiply(struct tensor *x, struct tensor *held, int with_bias, int64_t out, struct tensor **y) {
    void *numbers, *address, *bytes;
    int64_t dim, held_dim, *sizes, *held_sizes, *strides;
    int32_t dtype;
    uint32_t threads;
    if (torch.get_data_ptr(x, &numbers) || torch.get_dim(x, &dim) || torch.get_sizes(x, &sizes) ||
        torch.get_strides(x, &strides) || torch.get_dtype(x, &dtype) || torch.get_data_ptr(held, &bytes) ||
        torch.get_dim(held, &held_dim) || torch.get_sizes(held, &held_sizes) || torch.get_num_threads(&threads))
        return "armor::cpu_linears: torch does not tell what x and the table are";
    if (held_dim != 1 || held_sizes[0] != sizeof(struct table)) return "armor::cpu_linears: this is no table of linears";
    const struct table *table = bytes;
    if (dim < 1 || dim > DIMENSIONS || sizes[dim - 1] != table->columns || dtype != table->number)
        return "armor::cpu_linears: x is not what the linears were made for";

    int64_t y_sizes[DIMENSIONS], y_strides[DIMENSIONS], step = 1, y_step = 1, rows = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
        if (strides[d] != step && sizes[d] != 1) return "armor::cpu_linears: x is not contiguous";
        y_sizes[d] = d == dim - 1 ? out : sizes[d];
        y_strides[d] = y_step;
        step *= sizes[d] ? sizes[d] : 1; /* as torch counts them */
        y_step *= y_sizes[d] ? y_sizes[d] : 1;
        if (d < dim - 1) rows *= sizes[d];
    }
    struct part parts[PARTS];
    int64_t start = 0;
    for (int64_t i = 0; i < table->filled; start += parts[i++].out) parts[i] = table->parts[i];
    if (start != out) return "armor::cpu_linears: the linears do not have so many outputs together";

    if (torch.empty_strided(dim, y_sizes, y_strides, dtype, torch.cpu, 0, y) || torch.get_data_ptr(*y, &address))
        return "armor::cpu_linears: no memory for the output";
    if (!rows) return NULL;
    char *place = address;
    const int64_t weight = table->type == BF16 ? 2 : 4;
    for (int64_t i = 0; i < table->filled; i++) {
        parts[i].y = place;
        parts[i].y_stride = out;
        if (!with_bias) parts[i].bias = NULL;
        place += parts[i].out * weight;
    }
    const int error = armor_linears(torch.level, (int)table->type, numbers, rows, table->columns, parts,
                                    (int)table->filled, torch.parallel, (int)threads);
    return error ? "armor::cpu_linears: no memory to multiply in" : NULL;
}

/* armor::cpu_linears(Tensor x, Tensor table, bool with_bias, int out) -> Tensor */
void armor_cpu_linears(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs; /* 4 and 1, by the schema */
    struct tensor *x = (struct tensor *)stack[0], *table = (struct tensor *)stack[1], *y = NULL;
    const char *error = multiply(x, table, stack[2] & 1, (int64_t)stack[3], &y);
    torch.delete_tensor_object(x);
    torch.delete_tensor_object(table);
    if (error && y) torch.delete_tensor_object(y);
    torch.check(!error, __func__, __FILE__, __LINE__, error);
    stack[0] = (uint64_t)y;
}
