// main.c: the trainer on this build's engine. train_gpt.c includes it, so that `cc -O3 -fopenmp
// train_gpt.c -lm` builds the trainer; the Makefile, which has each engine in an object of its own
// already, compiles it alone.

#include "model/engines.h"
#include "run/trainer.h"

int main(int argc, char **argv) {
    program_begin(argv);
    return trainer_main(argc, argv, engine_default());
}
