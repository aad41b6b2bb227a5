#define BF16
#include "portable.h"
