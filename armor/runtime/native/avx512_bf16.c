#ifdef __x86_64__
#define BF16
#include "avx512.h"
#endif
