// shared_memory.cu: prints the shared memory with which attention's kernels are launched, for make
// cuda-report: ptxas does not know it. Compiled for the emulator; launches print instead of
// running.

#include "../model/cuda.h"
#undef LAUNCH
#define LAUNCH(kernel, grid, block, shared, ...) \
    print_shared(#kernel, shared, kernel, grid, block, __VA_ARGS__)

static const char *shape;

template <class... Rest> static void print_shared(const char *kernel, size_t bytes, Rest...) {
    const int parenthesis = *kernel == '(';
    if (bytes)
        printf("  %6zu  %.*s, %s\n", bytes, (int)strcspn(kernel + parenthesis, "<"),
               kernel + parenthesis, shape);
}

#define ENGINE_ONLY
#include "../../train_gpt.cu"

int main(void) {
    static const struct { size_t HS; int half; const char *name; } shapes[] = {
        {64, 1, "bf16, heads of up to 64"}, {128, 1, "bf16, heads of up to 128"},
        {64, 0, "fp32, heads of up to 64"}, {128, 0, "fp32, heads of up to 128"},
        {256, 0, "fp32, heads of up to 256"}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        shape = shapes[i].name;
        attention_forward(NULL, NULL, NULL, NULL, 1, 1, shapes[i].HS, 1, shapes[i].half, NULL);
        attention_backward(NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, 1, shapes[i].HS, 1,
                           shapes[i].half, NULL);
    }
    return 0;
}
