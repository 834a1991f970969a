# droppath.c: everything is built under build/ by one C compiler; `make help` lists the targets.
#
#   CC=clang                        another compiler
#   REAL=double                     all numbers in fp64 (for tests by finite differences)     -> build/double/
#   SAN=address,undefined           with sanitizers                                            -> build/san/
#   OPENMP=0                        one thread (also chosen where the compiler has no OpenMP)
#   MARCH=x86-64-v3                 instead of this machine's own instructions (native)
#   TEXT=/path                      make quickstart on your own text file or folder

CC     ?= cc
REAL   ?= float
SAN    ?=
OPENMP ?= auto
MARCH  ?= native
OUT    ?= runs/quickstart

B := build$(if $(filter double,$(REAL)),/double)$(if $(SAN),/san)

# Does the compiler take these flags? The empty answer is no.
probe = $(shell echo 'int main(void) { return 0; }' | $(CC) -Werror $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')

ifneq ($(OPENMP),0)
OMP := $(call probe,-fopenmp)
ifeq ($(OMP),)
OMP := $(call probe,-Xpreprocessor -fopenmp -lomp)
endif
endif
ARCH := $(or $(call probe,-march=$(MARCH)),$(call probe,-mcpu=$(MARCH)))

CFLAGS   ?= -O3 -g
WARNINGS := -Wall -Wextra $(if $(OMP),,-Wno-unknown-pragmas) $(if $(SAN),$(if $(call probe,-Wpass-failed),-Wno-pass-failed))
FLAGS    := -std=c11 $(CFLAGS) $(ARCH) -fno-math-errno -ffp-contract=fast $(WARNINGS) $(OMP) \
            $(if $(filter double,$(REAL)),-DREAL_DOUBLE) $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
LIBS     := -lm

TOOLS    := compare generate evaluate
PROGRAMS := $(B)/train_gpt $(TOOLS:%=$(B)/%) $(B)/data_bytes
HEADERS  := $(wildcard dev/*.h)

all: choices $(PROGRAMS)

choices:
	@echo "compiler: $$($(CC) --version | head -n 1)$(if $(SAN), with -fsanitize=$(SAN))"
	@echo "numbers:  $(REAL), instructions: $(or $(ARCH),the compiler's default)"
	@echo "threads:  $(if $(OMP),OpenMP,none (OPENMP=0, or a compiler without OpenMP): every step takes as long as on one core)"

$(B)/train_gpt: train_gpt.c
$(B)/engine_cpu.o: train_gpt.c
$(TOOLS:%=$(B)/%): $(B)/%: dev/tools/%.c $(B)/engine_cpu.o
$(B)/data_bytes: data/bytes.c
$(B)/test_gpt: test_gpt.c $(B)/engine_cpu.o

$(B)/train_gpt $(TOOLS:%=$(B)/%) $(B)/data_bytes $(B)/test_gpt:
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d $(filter %.c %.o,$^) -o $@ $(LIBS)

$(B)/engine_cpu.o:
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d -DENGINE_ONLY -c $< -o $@

$(B)/bench: dev/bench/bench.c                            # includes train_gpt.c, to reach its kernels
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d $< -o $@ $(LIBS)

-include $(wildcard $(B)/*.d)

# Downloads or finds a text, makes shards, trains with and without drop path, compares, prints a sample.
quickstart: all
	@OUT="$(OUT)" TEXT="$(TEXT)" sh scripts/quickstart.sh

# Everything that can be tested; ends with "N passed, N failed" and fails if any test does.
test: choices $(PROGRAMS) $(B)/test_gpt
	@BUILD=$(B) $(B)/test_gpt

# Kernels, steps and drop path beside the machine's peaks, and memory, in about ten minutes: dev/bench/README.md.
bench: choices $(B)/bench
	@$(B)/bench --json $(B)/bench.json

# Each header alone, as C11 and as C++17.
headers:
	@for h in $(HEADERS); do \
	    echo "#include \"$$h\"" | $(CC) -std=c11 -Wall -Wextra -Werror -I. -fsyntax-only -x c - || exit 1; \
	    echo "#include \"$$h\"" | $(CC) -std=c++17 -Wall -Wextra -Werror -I. -fsyntax-only -x c++ - || exit 1; \
	done; echo "headers: $(words $(HEADERS)) compile alone as C11 and as C++17"

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 9
	@echo "targets: all quickstart test bench headers clean"

clean:
	rm -rf build

.PHONY: all choices quickstart test bench headers help clean
