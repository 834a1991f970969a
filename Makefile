# droppath.c: one C compiler builds everything under build/; `make help` lists the targets.
#
#   CC=clang                        another compiler
#   REAL=double                     fp64 instead of fp32 (for finite differences): build/double/
#   SAN=address,undefined           with sanitizers: build/san/
#   OPENMP=0                        one thread (also where the compiler has no OpenMP)
#   MARCH=x86-64-v3                 instead of this machine's own instructions (native)
#   AMX=0                           without Intel's tiles, whose sums have other bits
#   FAT=1                           for any x86-64: the best of several engines runs: build/fat/
#   B=build/arm64                   another folder for what is built, as for another machine
#   CUDA=1                          the GPU programs as well: build/train_gpt_cuda and so on
#   GPU_ARCH="80 90"                their compute capabilities, or native; else all that nvcc knows
#   CUDA_HOME=/usr/local/cuda       where the CUDA Toolkit is (NVCC: its compiler)
#   PREFIX=/usr/local               where make install puts the programs; DESTDIR goes before it
#   TEXT=/path                      make quickstart on your own text file or folder
#   RUN="qemu-aarch64 -L /DIR"      make test: starts programs that this machine cannot run itself
#   EMULATE=0                       make test: leaves out the GPU engine, most of the time it takes
#   CXX=clang++                     make test: the C++ compiler for the GPU engine without a GPU

CC     ?= cc
REAL   ?= float
SAN    ?=
OPENMP ?= auto
MARCH  ?= native
AMX    ?= 1
FAT    ?= 0
CUDA   ?= 0
PREFIX ?= /usr/local
OUT    ?= runs/quickstart

B := build$(if $(filter 1,$(FAT)),/fat)$(if $(filter double,$(REAL)),/double)$(if $(filter \
     0,$(AMX)),/no_amx)$(if $(SAN),/san)

# Does the compiler take these flags? The empty answer is no.
probe = $(shell echo 'int main(void) { return 0; }' | \
          $(CC) -Werror $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')
ifneq ($(OPENMP),0)
OMP := $(or $(call probe,-fopenmp),$(call probe,-Xpreprocessor -fopenmp -lomp))
endif
ARCH := $(or $(call probe,-march=$(MARCH)),$(call probe,-mcpu=$(MARCH)))

CFLAGS   ?= -O3 -g
WARNINGS := -Wall -Wextra $(if $(OMP),,-Wno-unknown-pragmas) \
            $(if $(SAN),$(if $(call probe,-Wpass-failed),-Wno-pass-failed))
SANITIZE := $(if $(SAN),-DSANITIZED -fsanitize=$(SAN) -fno-omit-frame-pointer \
            -fno-sanitize-recover=undefined)
# Without this, gcc -O1 leaves the upper halves of vector registers dirty, and on Intel's processors
# libm's SSE code then takes ten times as long.
CLEAN    := $(call probe,-fexpensive-optimizations)
FLAGS     = -std=c11 $(CFLAGS) $(CLEAN) $(ARCH) -fno-math-errno -ffp-contract=fast $(WARNINGS) \
            $(OMP) $(if $(filter double,$(REAL)),-DREAL_DOUBLE) \
            $(if $(filter 0,$(AMX)),-DNO_TILES) $(SANITIZE)
LIBS     := -lm -pthread
# For --version. What is built already goes on naming the commit that it was built at.
COMMIT    = $(eval COMMIT := $(if $(wildcard .git),$(shell git describe --always --dirty \
              2>/dev/null)))$(COMMIT)
VERSION   = $(COMMIT:%=-DCOMMIT=%)
ENGINES  := $(B)/engine_cpu.o
TOOLS    := compare study generate evaluate export layers prune collapse exits
PROGRAMS := $(B)/train_gpt $(TOOLS:%=$(B)/%) $(B)/data_bytes
GPU_PROGRAMS := $(B)/train_gpt_cuda $(patsubst %,$(B)/%_cuda,$(filter-out export,$(TOOLS)))
BUILT    := $(PROGRAMS) $(if $(filter 1,$(CUDA)),$(GPU_PROGRAMS))

all: choices $(BUILT)

include dev/dev.mk

# ---- Programs: an object each, linked with the engine; train_gpt.c is compiled once, as that ----

# Compiles the first prerequisite, with more flags.
define cc
@mkdir -p $(@D)
$(CC) $(FLAGS) $(VERSION) $(1) -MMD -MP -MF $@.d -c $< -o $@
endef
link = $(CC) $(FLAGS) $(filter %.o,$^) -o $@ $(LIBS)

$(filter $(B)/engine_%.o,$(ENGINES)): $(B)/engine_%.o: train_gpt.c
	$(call cc,-DENGINE_ONLY $(ENGINE_FLAGS))
$(B)/main.o: dev/main.c
	$(call cc)
$(TOOLS:%=$(B)/%.o): $(B)/%.o: dev/tools/%.c
	$(call cc)
$(B)/data_bytes.o: data/bytes.c
	$(call cc)

$(B)/train_gpt: $(B)/main.o
$(TOOLS:%=$(B)/%) $(B)/data_bytes: %: %.o
$(B)/train_gpt $(TOOLS:%=$(B)/%): $(ENGINES)
$(PROGRAMS):
	$(link)

# ---- The same programs on a GPU: make CUDA=1 ----

$(B)/engine_cuda.o: train_gpt.cu
	$(call nvcc,-DENGINE_ONLY)
$(B)/main_cuda.o: dev/main.c
	$(call cc,-DCUDA_BUILD)
$(TOOLS:%=$(B)/%_cuda.o): $(B)/%_cuda.o: dev/tools/%.c
	$(call cc,-DCUDA_BUILD)

$(B)/train_gpt_cuda: $(B)/main_cuda.o
$(TOOLS:%=$(B)/%_cuda): %: %.o
$(TOOLS:%=$(B)/%_cuda) $(B)/train_gpt_cuda: $(B)/engine_cuda.o
	$(gpu_link)

# ---- What is done with them ----

# Finds or downloads a text, makes shards, trains with and without drop path, compares, samples.
quickstart: all
	@BUILD="$(B)" OUT="$(OUT)" TEXT="$(TEXT)" sh scripts/quickstart.sh

# Into PREFIX/bin, as droppath-compare and so on: other programs have the short names. MARCH=native
# runs on processors like this one only; for others install what FAT=1 builds.
installed = $(foreach p,$(notdir $(1)),$(or $(filter train_gpt%,$(p)),droppath-$(subst _,-,$(p))))
BIN = $(DESTDIR)$(PREFIX)/bin
DOC = $(DESTDIR)$(PREFIX)/share/doc/droppath

install: $(BUILT)
	install -d "$(BIN)" "$(DOC)"
	$(foreach p,$(BUILT),install -m 755 $(p) "$(BIN)/$(call installed,$(p))" &&) \
	    install -m 644 README.md LICENSE "$(DOC)"

uninstall:
	rm -f $(foreach p,$(call installed,$(PROGRAMS) $(GPU_PROGRAMS)),"$(BIN)/$(p)")
	rm -f "$(DOC)/README.md" "$(DOC)/LICENSE"
	[ ! -d "$(DOC)" ] || rmdir "$(DOC)"

choices:
	@echo "compiler: $$($(CC) --version | head -n 1)$(if $(SAN), with -fsanitize=$(SAN))"
	@echo "numbers:  $(REAL), instructions: $(or $(FAT_CHOICE),$(ARCH),the compiler's default)"
	@[ "$(CUDA)" != 1 ] || echo "GPU:      $$($(NVCC) --version | tail -n 1), for $(GPU_ARCH)"
	@echo "C++:      $(if $(EMU),$(CXX),none: the tests leave out the GPU engine)"
	@echo "threads:  $(if $(OMP),OpenMP,none: OPENMP=0, or a compiler without OpenMP)"

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile
	@echo "targets: all quickstart test bench install uninstall clean"
	@echo "developers' targets: $(DEV_TARGETS)"

clean:
	rm -rf build

.PHONY: all choices quickstart install uninstall help clean
-include $(wildcard $(B)/*.d $(B)/fuzz/*.d)
