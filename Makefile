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
#   CUDA=1                          also the programs for the GPU: build/train_gpt_cuda, build/compare_cuda, ...
#   GPU_ARCH="80 90"                compute capabilities they are for, or native: this machine's; all that nvcc knows from 8.0
#   CUDA_HOME=/usr/local/cuda       where the CUDA Toolkit is (NVCC: its compiler)
#   CXX=clang++                     another C++ compiler, for the tests that run the GPU engine without a GPU
#   EMULATE=0                       leaves those tests out: they are most of the time that make test takes
#   TEXT=/path                      make quickstart on your own text file or folder

CC     ?= cc
REAL   ?= float
SAN    ?=
OPENMP ?= auto
MARCH  ?= native
FAT    ?= 0
RUN    ?=
EMULATE ?= 1
OUT    ?= runs/quickstart
CUDA   ?= 0

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

# The GPU engine, make CUDA=1.
CUDA_HOME ?= /usr/local/cuda
NVCC      ?= $(or $(wildcard $(CUDA_HOME)/bin/nvcc),nvcc)
GPU_KNOWN  = $(eval GPU_KNOWN := $(shell $(NVCC) --list-gpu-arch 2>/dev/null | sed -n 's/^compute_//p' | awk '$$1 >= 80' | sort -n))$(GPU_KNOWN)
GPU_ARCH  ?= $(GPU_KNOWN)
GPU_CODE   = $(if $(filter native,$(GPU_ARCH)),-arch=native,$(GPU_CODES))
GPU_CODES  = $(foreach a,$(GPU_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) \
             $(foreach a,$(lastword $(GPU_ARCH)),-gencode arch=compute_$(a),code=compute_$(a))
NVCCFLAGS ?= -O3 -lineinfo
GPU_FLAGS  = -std=c++17 $(NVCCFLAGS) $(GPU_CODE) -Xcompiler -Wall,-Wextra $(if $(OMP),-Xcompiler $(OMP))
NCCL_TEST := printf '\#include <nccl.h>\nint main() { ncclUniqueId id; return ncclGetUniqueId(&id); }\n'
ifeq ($(origin NCCL),undefined)                          # asked once, when a recipe first needs it: it takes seconds
NCCL = $(eval NCCL := $(shell $(NCCL_TEST) | $(NVCC) -x cu - -o /dev/null -lnccl 2>/dev/null && echo 1))$(NCCL)
endif
GPU_FLAGS += $(if $(filter 1,$(NCCL)),,-DNO_NCCL)
GPU_LIBS   = -L$(CUDA_HOME)/lib64 -Xlinker -rpath,$(CUDA_HOME)/lib64 -lcublasLt $(if $(filter 1,$(NCCL)),-lnccl) -lm -lpthread

# C++ is for the tests that run the GPU engine where there is no GPU, on dev/emu: the C compiler's own, if it has C++17.
ifeq ($(origin CXX),default)
CXX := $(CC)
endif
cxx_probe = $(shell printf '\043include <vector>\nint main() { std::vector<int> v(1); return v[0]; }\n' | \
              $(CXX) -std=c++17 -x c++ - -o /dev/null $(1) 2>/dev/null && echo '$(1)')
CXX_LIB   := $(or $(call cxx_probe,-lstdc++),$(call cxx_probe,-lc++))
EMU       := $(if $(and $(CXX_LIB),$(filter 1,$(EMULATE))),$(B)/test_emu.o $(if $(filter float,$(REAL)),$(B)/test_cuda.o $(B)/test_nccl.o))
EMU_PROGRAM := $(if $(filter %/test_cuda.o,$(EMU)),$(B)/train_gpt_emu)

CFLAGS   ?= -O3 -g
WARNINGS := -Wall -Wextra $(if $(OMP),,-Wno-unknown-pragmas) $(if $(SAN),$(if $(call probe,-Wpass-failed),-Wno-pass-failed))
FLAGS    := -std=c11 $(CFLAGS) $(ARCH) -fno-math-errno -ffp-contract=fast $(WARNINGS) $(OMP) \
            $(if $(filter double,$(REAL)),-DREAL_DOUBLE) $(if $(SAN),-DSANITIZED -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
LIBS     := -lm -pthread
# For --version. What is built already stays as it is at a new commit, and goes on naming the one that it was built at.
COMMIT    = $(eval COMMIT := $(if $(wildcard .git),$(shell git describe --always --dirty 2>/dev/null)))$(COMMIT)
VERSION   = $(COMMIT:%=-DCOMMIT=%)
# Tests take longer to compile than to run.
TEST_O   := -O1
# No contraction: on every compiler the sums are those that the code says.
EMU_FLAGS := -std=c++17 $(CFLAGS) $(ARCH) -fno-math-errno -ffp-contract=off -fno-strict-aliasing $(WARNINGS) \
             -Wno-unknown-pragmas -x c++ -DCUDA_EMULATED -Idev/emu -I. \
             $(TEST_O) $(if $(SAN),-DSANITIZED -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined -fno-sanitize=vptr \
             $(call probe,-fno-sanitize=function))       # these two need a C++ linker

TOOLS    := compare generate evaluate export
PROGRAMS := $(B)/train_gpt $(TOOLS:%=$(B)/%) $(B)/data_bytes
GPU_PROGRAMS := $(B)/train_gpt_cuda $(patsubst %,$(B)/%_cuda,$(filter-out export,$(TOOLS)))
HEADERS  := $(filter-out dev/cuda.h,$(wildcard dev/*.h))   # cuda.h is for nvcc, or for dev/emu

all: choices $(PROGRAMS) $(if $(filter 1,$(CUDA)),$(GPU_PROGRAMS))

choices:
	@echo "compiler: $$($(CC) --version | head -n 1)$(if $(SAN), with -fsanitize=$(SAN))"
	@echo "numbers:  $(REAL), instructions: $(or $(FAT_CHOICE),$(ARCH),the compiler's default)"
	@[ "$(CUDA)" != 1 ] || echo "GPU:      $$($(NVCC) --version | tail -n 1), for compute capability $(GPU_ARCH)"
	@echo "C++:      $(if $(EMU),$(CXX),none: the tests leave out the GPU engine)"
	@echo "threads:  $(if $(OMP),OpenMP,none (OPENMP=0, or a compiler without OpenMP): every step takes as long as on one core)"

# train_gpt.c is the program and an engine, of a fat build the last; the other programs are linked with engines alone.
$(B)/train_gpt: train_gpt.c $(if $(FAT_ENGINES),$(filter-out $(B)/engine_$(FAT_BASE).o,$(ENGINES)))
$(TOOLS:%=$(B)/%): $(B)/%: dev/tools/%.c $(ENGINES)
$(B)/interop_logits: dev/test/interop/logits.c $(ENGINES)
$(B)/torture: dev/torture/torture.c $(ENGINES)
$(B)/torture: TEST_FLAGS = $(TEST_O) -DFAULTS
$(B)/data_bytes: data/bytes.c
$(B)/fuzz_replay: dev/fuzz/replay.c $(ENGINES)         # which some compilers want though it calls none
$(B)/test_gpt: test_gpt.c $(ENGINES) $(if $(FAT_ENGINES),,$(B)/engine_no_pairs.o) $(EMU)
$(B)/fuzz_replay: TEST_FLAGS = $(TEST_O)
$(B)/test_gpt: TEST_FLAGS = $(TEST_O) $(if $(EMU),-DCUDA_EMULATED)
$(B)/test_gpt: LIBS += $(if $(EMU),$(CXX_LIB))
$(B)/engine_no_pairs.o: train_gpt.c                      # for one test: without dot products of pairs (dev/vector.h)

$(B)/train_gpt $(TOOLS:%=$(B)/%) $(B)/data_bytes $(B)/test_gpt $(B)/interop_logits $(B)/fuzz_replay $(B)/torture:
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(VERSION) $(FAT_$(@F)) $(TEST_FLAGS) -MMD -MF $@.d $< $(filter %.o,$^) -o $@ $(LIBS)

$(filter $(B)/engine_%.o,$(ENGINES)): $(B)/engine_%.o: train_gpt.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FAT_$*:%=-m%) $(if $(FAT_BASE),-DCPU_ENGINE=cpu_engine_$*) -MMD -MF $@.d -DENGINE_ONLY -c $< -o $@

$(B)/engines.o: dev/engines.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FAT_TABLE) -MMD -MF $@.d -c $< -o $@

$(B)/engine_no_pairs.o:
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d -DENGINE_ONLY -DNO_PAIRS -DCPU_ENGINE=no_pairs_engine -c $< -o $@

$(B)/test_emu.o: dev/test/test_emu.cu
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -MMD -MF $@.d -c $< -o $@

# The engine and the tests of its kernels; with little memory for logits, so that there are several chunks of them.
$(B)/test_cuda.o: dev/test/test_cuda.cu
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -DLOGITS_BYTES='(1 << 18)' -DWORKSPACE_BYTES=65536 -MMD -MF $@.d -c $< -o $@

$(B)/test_nccl.o: dev/test/test_nccl.cu
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -MMD -MF $@.d -c $< -o $@

$(B)/train_gpt_emu: train_gpt.cu                         # for whole runs of several ranks
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) $(VERSION) -DCUDA_BUILD -MMD -MF $@.d $< -o $@ $(CXX_LIB) $(LIBS)

$(B)/train_gpt_cuda: train_gpt.cu
	@mkdir -p $(@D)
	$(NVCC) $(GPU_FLAGS) $(VERSION) -DCUDA_BUILD -MMD -MF $@.d $< -o $@ $(GPU_LIBS)

$(B)/engine_cuda.o: train_gpt.cu
	@mkdir -p $(@D)
	$(NVCC) $(GPU_FLAGS) -MMD -MF $@.d -DENGINE_ONLY -c $< -o $@

$(TOOLS:%=$(B)/%_cuda.o): $(B)/%_cuda.o: dev/tools/%.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(VERSION) -DCUDA_BUILD -MMD -MF $@.d -c $< -o $@

$(TOOLS:%=$(B)/%_cuda): $(B)/%_cuda: $(B)/%_cuda.o $(B)/engine_cuda.o
	$(NVCC) $(if $(OMP),-Xcompiler $(OMP)) $^ -o $@ $(GPU_LIBS)

# All tests that concern the GPU engine, on a GPU.
$(B)/test_gpt_cuda.o: test_gpt.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -DCUDA_BUILD -MMD -MF $@.d -c $< -o $@

$(B)/test_cuda_device.o: dev/test/test_cuda.cu
	@mkdir -p $(@D)
	$(NVCC) $(GPU_FLAGS) -DLOGITS_BYTES='(1 << 18)' -MMD -MF $@.d -c $< -o $@

$(B)/test_gpt_cuda: $(B)/test_gpt_cuda.o $(ENGINES) $(B)/engine_no_pairs.o $(B)/test_cuda_device.o
	$(NVCC) $(if $(OMP),-Xcompiler $(OMP)) $^ -o $@ $(GPU_LIBS)

test-cuda: choices $(B)/test_gpt_cuda
	@$(B)/test_gpt_cuda $$($(B)/test_gpt_cuda --list | grep -e ^engine_ -e ^cuda_ -e ^parity_)

# What measures on a GPU; the same under the emulator, to try it where there is none.
$(B)/bench_cuda.o: dev/bench/bench_cuda.c
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d -c $< -o $@

$(B)/bench_cuda: $(B)/bench_cuda.o $(B)/engine_cuda.o
	$(NVCC) $(if $(OMP),-Xcompiler $(OMP)) $^ -o $@ $(GPU_LIBS)

$(B)/kernels_cuda: dev/bench/kernels.cu                  # includes train_gpt.cu, to reach its kernels
	@mkdir -p $(@D)
	$(NVCC) $(GPU_FLAGS) -MMD -MF $@.d $< -o $@ $(GPU_LIBS)

$(B)/gpu_summary: dev/bench/gpu_summary.c                # the table at the end of scripts/gpu_check.sh
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d $< -o $@ $(LIBS)

$(B)/bench_emu: $(B)/bench_cuda.o $(B)/engine_emu.o
	$(CC) $(FLAGS) $^ -o $@ $(LIBS) $(CXX_LIB)

$(B)/engine_emu.o: train_gpt.cu
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -MMD -MF $@.d -DENGINE_ONLY -c $< -o $@

$(B)/kernels_emu: dev/bench/kernels.cu
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -MMD -MF $@.d $< -o $@ $(LIBS) $(CXX_LIB)

$(B)/shared_memory: dev/test/shared_memory.cu
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -O0 -MMD -MF $@.d $< -o $@ $(LIBS) $(CXX_LIB)

# Registers and spills of every kernel, for each compute capability; shared memory of those that take much of it.
cuda-report: $(B)/shared_memory
	@echo "bytes of shared memory of a block, all of it given at the launch:"; $(B)/shared_memory
	@for a in $(GPU_ARCH); do \
	    echo "compute capability $$a: registers, bytes spilled, bytes of stack"; \
	    $(NVCC) -std=c++17 -O3 -arch=sm_$$a -Xptxas -v -DENGINE_ONLY -cubin -o /dev/null train_gpt.cu 2>&1 | c++filt | \
	        sh dev/test/cuda_report.sh || exit 1; \
	done

$(B)/bench: dev/bench/bench.c                            # includes train_gpt.c, to reach its kernels
	$(if $(FAT_ENGINES),$(error bench measures the one engine that is compiled into it: MARCH=x86-64-v3 instead of FAT=1))
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -MMD -MF $@.d $< -o $@ $(LIBS)

-include $(wildcard $(B)/*.d $(B)/fuzz/*.d)

# Downloads or finds a text, makes shards, trains with and without drop path, compares, prints a sample.
quickstart: all
	@BUILD="$(B)" OUT="$(OUT)" TEXT="$(TEXT)" sh scripts/quickstart.sh

# Everything that can be tested; ends with "N passed, N failed" and fails if any test does.
test: choices $(PROGRAMS) $(B)/test_gpt $(B)/fuzz_replay $(B)/torture $(EMU_PROGRAM)
	@BUILD="$(strip $(RUN) $(B))" $(RUN) $(B)/test_gpt

# Every parser of outside bytes under libFuzzer, one after the other, FUZZ_RUNS inputs each; it stops at the first finding.
# FUZZ="json shards" takes some of them, FUZZ_SECONDS=60 ends each after so long: dev/fuzz/README.md.
FUZZ_RUNS    ?= 10000000
FUZZ_SECONDS ?= 0
FUZZ_CC      ?= clang
FUZZ_FLAGS   := -std=c11 -O2 -g -Wall -Wextra -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
                -fno-omit-frame-pointer

$(B)/fuzz/parsers: dev/fuzz/fuzz.c
	@mkdir -p $(@D)
	$(FUZZ_CC) $(FUZZ_FLAGS) -MMD -MF $@.d $< -o $@ -lm -pthread

fuzz: $(B)/fuzz/parsers $(B)/fuzz_replay
	@FUZZ_RUNS=$(FUZZ_RUNS) FUZZ_SECONDS=$(FUZZ_SECONDS) BUILD=$(B) sh dev/fuzz/run.sh $(FUZZ)

# Runs that are killed, or whose disk fails, at every call that changes the disk: dev/torture/torture.c. Some minutes.
torture: choices $(B)/torture
	@OMP_WAIT_POLICY=passive $(RUN) $(B)/torture

# Our checkpoints in transformers and its checkpoints here: makes a virtual environment once, or takes VENV=/path of one.
test-interop: $(PROGRAMS) $(B)/interop_logits
	@BUILD="$(B)" VENV="$(VENV)" sh dev/test/interop/run.sh

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
	    echo "#include \"$$h\"" | $(CC) -std=c11 -Wall -Wextra -Werror -Wno-unknown-pragmas -I. -fsyntax-only -x c - || exit 1; \
	    echo "#include \"$$h\"" | $(CC) -std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -I. -fsyntax-only -x c++ - || exit 1; \
	done; echo "headers: $(words $(HEADERS)) compile alone as C11 and as C++17"
	@[ -z "$(EMU)" ] || for h in cublasLt.h cuda_bf16.h cuda_runtime.h simt.h tensor.h ../cuda.h; do \
	    echo "#include \"dev/emu/$$h\"" | $(CXX) $(EMU_FLAGS) -Werror -fsyntax-only - || exit 1; \
	done

# Of a fat build: each engine's instructions are in its object alone.
instructions: $(PROGRAMS) $(B)/test_gpt
	@BUILD=$(B) sh dev/test/fat.sh

# The Python scripts that draw and follow runs, and the recipes, in a virtual environment of what scripts/requirements.txt
# names. Another Python that has it does as well: make test-look PYTHON=python3
LOOK_VENV := build/venv-look
PYTHON    ?= $(LOOK_VENV)/bin/python
$(LOOK_VENV)/bin/python: scripts/requirements.txt
	@mkdir -p build; { python3 -m venv $(LOOK_VENV) && $@ -m pip install -q -r $< && touch $@; } >$(LOOK_VENV).log 2>&1 || \
	    { tail -n 3 $(LOOK_VENV).log; rm -rf $(LOOK_VENV); echo "error: cannot install $< in $(LOOK_VENV)"; \
	      echo "  hint: it needs Python 3.9 or newer with venv, and a network; the log is $(LOOK_VENV).log"; exit 1; }

test-look: $(PROGRAMS) $(filter $(LOOK_VENV)/%,$(PYTHON))
	@BUILD=$(B) $(PYTHON) -m unittest discover -b -s dev/test -p 'test_look_*.py'

# How much of train_gpt.c and dev/*.h the tests reach (the GPU engine left out); LINES=1 lists what they do not. gcc only.
COVERAGE_FLAGS := -O1 -g --coverage -fno-inline -fkeep-inline-functions -fkeep-static-functions
coverage:
	@rm -f build/coverage/*.gcda
	@$(MAKE) --no-print-directory CC=gcc B=build/coverage EMULATE=0 CFLAGS="$(COVERAGE_FLAGS)" test
	@python3 dev/test/coverage.py build/coverage $(if $(LINES),--lines)

# Whether the tests notice a changed operator, constant or statement in drop path and checkpoints: dev/mutate/mutate.py.
mutate:
	@python3 dev/mutate/mutate.py --cc "$(CC)"

# Hours of a small run that is stopped, killed and resumed: memory, metrics, steps and weights must come out as undisturbed.
SECONDS ?= 3600
soak: $(B)/train_gpt $(B)/data_bytes
	@python3 dev/torture/soak.py --build $(B) --seconds $(SECONDS)

# Data races, by clang's ThreadSanitizer with an OpenMP runtime that it understands (dev/README.md, Threads).
test-threads:
	@sh dev/test/threads.sh $(TESTS)

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 16
	@echo "targets: $(TARGETS)"

clean:
	rm -rf build

TARGETS := all quickstart test bench test-interop test-data test-look test-cuda test-threads fuzz coverage mutate torture soak \
           headers instructions cuda-report clean
.PHONY: choices help $(TARGETS)
