// main.c: the trainer on this build's engine, which the Makefile has in an object of its own already.
// `cc -O3 -fopenmp train_gpt.c -lm` alone takes the same lines at the end of train_gpt.c instead.

#include "engines.h"
#include "trainer.h"

int main(int argc, char **argv) {
    program_begin(argv);
    return trainer_main(argc, argv, engine_default());
}
