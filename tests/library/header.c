/* The headers alone, in any C and in C++: tests/test_library_abi.py compiles this as each. */
#include "apet_testing.h"

int main(void) { return apet_version() == 0; }
