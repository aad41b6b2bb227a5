#ifdef __x86_64__
#define BF16
#include "avx2.h"
#endif
