#ifdef __x86_64__
#define BF16_PRODUCTS
#include "avx512.h"
#endif
