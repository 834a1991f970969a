# droppath.c: everything is built under build/ by one C compiler; `make help` lists the targets.
#
#   CC=clang                        another compiler
#   REAL=double                     all numbers in fp64 (for tests by finite differences)     -> build/double/
#   SAN=address,undefined           with sanitizers                                            -> build/san/
#   OPENMP=0                        one thread (also chosen where the compiler has no OpenMP)
#   MARCH=x86-64-v3                 instead of this machine's own instructions (native)
#   FAT=1                           for any x86-64: several engines, the best is chosen at start -> build/fat/
#   B=build/arm64                   another folder for all that is built, as for another machine
#   RUN="qemu-aarch64 -L /DIR"      make test: what starts the programs where this machine cannot itself
#   TEXT=/path                      make quickstart on your own text file or folder

CC     ?= cc
REAL   ?= float
SAN    ?=
OPENMP ?= auto
MARCH  ?= native
FAT    ?= 0
RUN    ?=
OUT    ?= runs/quickstart

B := build$(if $(filter 1,$(FAT)),/fat)$(if $(filter double,$(REAL)),/double)$(if $(SAN),/san)

# Does the compiler take these flags? The empty answer is no.
probe = $(shell echo 'int main(void) { return 0; }' | $(CC) -Werror $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')

ifneq ($(OPENMP),0)
OMP := $(call probe,-fopenmp)
ifeq ($(OMP),)
OMP := $(call probe,-Xpreprocessor -fopenmp -lomp)
endif
endif
ARCH := $(or $(call probe,-march=$(MARCH)),$(call probe,-mcpu=$(MARCH)))
ENGINES := $(B)/engine_cpu.o

# The engines of a fat build, best first, and the instructions that train_gpt.c is compiled for under each name;
# dev/engines.c asks the processor for the same. All else is compiled for the last, which every processor has. Another
# architecture would have its own list here.
ifeq ($(FAT),1)
ifneq ($(strip $(shell echo __x86_64__ | $(CC) -E -P -x c -)),1)
$(error FAT=1 is for x86-64 only, and $(CC) compiles for something else: leave it out)
endif
ifneq ($(MARCH),native)
$(error FAT=1 and MARCH=$(MARCH) exclude each other: a fat build has engines for all)
endif
FAT_ENGINES    := avx512bf16 avx512 avx2 sse2
FAT_avx2       := avx2 fma
FAT_avx512     := $(FAT_avx2) avx512f avx512bw avx512cd avx512dq avx512vl
FAT_avx512bf16 := $(FAT_avx512) avx512bf16
FAT_CHOICE     := the best at start of $(FAT_ENGINES)
FAT_BASE       := $(lastword $(FAT_ENGINES))
FAT_train_gpt  := -DCPU_ENGINE=cpu_engine_$(FAT_BASE)
FAT_TABLE      := '-DCPU_ENGINES(X)=$(foreach e,$(FAT_ENGINES),X($(e), 1$(FAT_$(e):%= && HAS(%))))'
FAT_test_gpt   := $(FAT_TABLE)
ARCH           := -march=x86-64
ENGINES        := $(FAT_ENGINES:%=$(B)/engine_%.o) $(B)/engines.o
endif

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
	@echo "numbers:  $(REAL), instructions: $(or $(FAT_CHOICE),$(ARCH),the compiler's default)"
	@echo "threads:  $(if $(OMP),OpenMP,none (OPENMP=0, or a compiler without OpenMP): every step takes as long as on one core)"

# train_gpt.c is the program and an engine, of a fat build the last; the other programs are linked with engines alone.
$(B)/train_gpt: train_gpt.c $(if $(FAT_ENGINES),$(filter-out $(B)/engine_$(FAT_BASE).o,$(ENGINES)))
$(TOOLS:%=$(B)/%): $(B)/%: dev/tools/%.c $(ENGINES)
$(B)/data_bytes: data/bytes.c
$(B)/test_gpt: test_gpt.c $(ENGINES) $(if $(FAT_ENGINES),,$(B)/engine_no_pairs.o)
$(B)/engine_no_pairs.o: train_gpt.c                      # for one test: without dot products of pairs (dev/vector.h)

$(B)/train_gpt $(TOOLS:%=$(B)/%) $(B)/data_bytes $(B)/test_gpt:
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FAT_$(@F)) -MMD -MF $@.d $< $(filter %.o,$^) -o $@ $(LIBS)

$(filter $(B)/engine_%.o,$(ENGINES)): $(B)/engine_%.o: train_gpt.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FAT_$*:%=-m%) $(if $(FAT_BASE),-DCPU_ENGINE=cpu_engine_$*) -MMD -MF $@.d -DENGINE_ONLY -c $< -o $@

$(B)/engines.o: dev/engines.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FAT_TABLE) -MMD -MF $@.d -c $< -o $@

$(B)/engine_no_pairs.o:
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d -DENGINE_ONLY -DNO_PAIRS -DCPU_ENGINE=no_pairs_engine -c $< -o $@

$(B)/bench: dev/bench/bench.c                            # includes train_gpt.c, to reach its kernels
	$(if $(FAT_ENGINES),$(error bench measures the one engine that is compiled into it: MARCH=x86-64-v3 instead of FAT=1))
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d $< -o $@ $(LIBS)

-include $(wildcard $(B)/*.d)

# Downloads or finds a text, makes shards, trains with and without drop path, compares, prints a sample.
quickstart: all
	@BUILD="$(B)" OUT="$(OUT)" TEXT="$(TEXT)" sh scripts/quickstart.sh

# Everything that can be tested; ends with "N passed, N failed" and fails if any test does.
test: choices $(PROGRAMS) $(B)/test_gpt
	@BUILD="$(strip $(RUN) $(B))" $(RUN) $(B)/test_gpt

# Kernels, steps and drop path beside the machine's peaks, and memory, in about ten minutes: dev/bench/README.md.
bench: choices $(B)/bench
	@$(B)/bench --json $(B)/bench.json

# data/'s Python programs, in a virtual environment with what data/requirements.txt names. GPT2_FILES=DIR, with GPT-2's
# encoder.json and vocab.bpe, tests its tokenizer where it cannot be downloaded.
DATA_VENV := build/venv-data
$(DATA_VENV)/ready: data/requirements.txt
	@mkdir -p build; { python3 -m venv $(DATA_VENV) && $(DATA_VENV)/bin/python -m pip install -q -r $<; } >$(DATA_VENV).log 2>&1 && touch $@ || \
	    { tail -n 3 $(DATA_VENV).log; echo "error: cannot install data/requirements.txt in $(DATA_VENV)"; \
	      echo "  hint: it needs Python 3.9 or newer with venv, and a network; the log is $(DATA_VENV).log"; exit 1; }

test-data: $(B)/data_bytes $(DATA_VENV)/ready
	@BUILD=$(B) $(DATA_VENV)/bin/python dev/test/test_data.py

# Each header alone, as C11 and as C++17.
headers:
	@for h in $(HEADERS); do \
	    echo "#include \"$$h\"" | $(CC) -std=c11 -Wall -Wextra -Werror -I. -fsyntax-only -x c - || exit 1; \
	    echo "#include \"$$h\"" | $(CC) -std=c++17 -Wall -Wextra -Werror -I. -fsyntax-only -x c++ - || exit 1; \
	done; echo "headers: $(words $(HEADERS)) compile alone as C11 and as C++17"

# Of a fat build: each engine's instructions are in its object alone.
instructions: $(PROGRAMS) $(B)/test_gpt
	@BUILD=$(B) sh dev/test/fat.sh

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 11
	@echo "targets: all quickstart test test-data bench headers instructions clean"

clean:
	rm -rf build

.PHONY: all choices quickstart test test-data bench headers instructions help clean
