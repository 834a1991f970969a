// engines.h: the available engines. A program chooses one; everything else is independent of it
// (engine.h).
#ifndef ENGINES_H
#define ENGINES_H

#include "engine.h"

#ifdef __cplusplus
extern "C" {
#endif

// The engine of train_gpt.c; in a fat build (make FAT=1), the best one that this processor can run.
const Engine *engine_cpu(void);

// Of a fat build: whether the processor has AMX's tiles and their products in bf16, and the kernel
// lets this process use them.
int engines_have_amx(void);

// The engine of train_gpt.cu, on the first device of CUDA_VISIBLE_DEVICES. Starts the driver, which
// does not survive a fork: call it in the process that will use it.
const Engine *engine_cuda(void);

#ifdef __cplusplus
}
#endif

// The engine that this build's programs use.
static inline const Engine *engine_default(void) {
#ifdef CUDA_BUILD                                        // make CUDA=1
    return engine_cuda();
#else
    return engine_cpu();
#endif
}

// Its name. Does not start the driver.
static inline const char *engine_default_name(void) {
#ifdef CUDA_BUILD
    return "CUDA";
#else
    return engine_cpu()->name;
#endif
}

#endif
