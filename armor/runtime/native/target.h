/* Compile what follows for TARGET, the file's own instructions, whatever the compiler's flags say. clang also wants the
 * end of it marked: END_TARGET. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define STRINGIFY(x) #x
#define PRAGMA(x) _Pragma(STRINGIFY(x))
#ifdef __clang__
#define END_TARGET PRAGMA(clang attribute pop)
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
#define END_TARGET
PRAGMA(GCC target(TARGET))
#endif
