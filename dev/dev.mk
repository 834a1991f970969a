# dev.mk: a part of the Makefile, with what only a developer runs: tests, benchmarks, fuzzers; and
# with how fat and GPU builds are compiled.

RUN     ?=
EMULATE ?= 1

# ---- FAT=1: several engines, the best is chosen at start ----

# The engines, best first, and the instructions that train_gpt.c is compiled for under each name;
# dev/model/engines.c asks the processor for the same. Everything else is compiled for the last one,
# which every processor has. Another architecture would have its own list here.
ifeq ($(FAT),1)
ifneq ($(strip $(shell echo __x86_64__ | $(CC) -E -P -x c -)),1)
$(error FAT=1 is for x86-64 only, and $(CC) compiles for something else: leave it out)
endif
ifneq ($(MARCH),native)
$(error FAT=1 and MARCH=$(MARCH) exclude each other: a fat build has engines for all)
endif
FAT_ENGINES    := amx avx512bf16 avx512 avx2 sse2
FAT_avx2       := avx2 fma
FAT_avx512     := $(FAT_avx2) avx512f avx512bw avx512cd avx512dq avx512vl
FAT_avx512bf16 := $(FAT_avx512) avx512bf16
FAT_amx        := $(FAT_avx512bf16) amx-tile amx-bf16
FAT_CHOICE     := the best at start of $(FAT_ENGINES)
# not all compilers can ask for amx-tile and amx-bf16
FAT_asks        = $(patsubst %, && HAS(%),$(filter-out amx-%,$(FAT_$(1)))) \
                  $(if $(filter amx-%,$(FAT_$(1))), && HAS_AMX)
FAT_TABLE      := '-DCPU_ENGINES(X)=$(foreach e,$(FAT_ENGINES),X($(e), 1$(call FAT_asks,$(e))))'
ENGINE_FLAGS    = $(FAT_$*:%=-m%) -DCPU_ENGINE=cpu_engine_$*
ARCH           := -march=x86-64
ENGINES        := $(FAT_ENGINES:%=$(B)/engine_%.o) $(B)/engines.o
endif

$(B)/engines.o: dev/model/engines.c
	$(call cc,$(FAT_TABLE))

# ---- CUDA=1: how nvcc is called ----

CUDA_HOME ?= /usr/local/cuda
NVCC      ?= $(or $(wildcard $(CUDA_HOME)/bin/nvcc),nvcc)
NVCCFLAGS ?= -O3 -lineinfo
GPU_ARCH  ?= $(GPU_KNOWN)
GPU_CODE   = $(if $(filter native,$(GPU_ARCH)),-arch=native,\
             $(foreach a,$(GPU_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) \
             $(foreach a,$(lastword $(GPU_ARCH)),-gencode arch=compute_$(a),code=compute_$(a)))
# nvcc is asked once, when a recipe first needs the answer: it takes seconds.
GPU_KNOWN  = $(eval GPU_KNOWN := $(shell $(NVCC) --list-gpu-arch 2>/dev/null | \
               sed -n 's/^compute_//p' | awk '$$1 >= 80' | sort -n))$(GPU_KNOWN)
NCCL_TEST := printf '\#include <nccl.h>\nint main() { ncclUniqueId i; ncclGetUniqueId(&i); }\n'
ifeq ($(origin NCCL),undefined)
NCCL       = $(eval NCCL := $(shell $(NCCL_TEST) | \
               $(NVCC) -x cu - -o /dev/null $(NCCL_FLAGS) $(NCCL_LIBS) 2>/dev/null && \
               echo 1))$(NCCL)
endif
# cuBLASLt and NCCL may be the toolkit's, the system's, or in the packages of PyTorch's wheels,
# where libraries have no name without a version: they are linked as files. Looked for when a recipe
# first needs them.
find_cuda  = $(shell CUDA_HOME='$(CUDA_HOME)' sh dev/find_cuda.sh $(1))
CUBLAS_H   = $(eval CUBLAS_H := $(call find_cuda,cublasLt.h))$(CUBLAS_H)
CUBLAS_SO  = $(eval CUBLAS_SO := $(call find_cuda,libcublasLt.so cublasLt.h))$(CUBLAS_SO)
NCCL_H     = $(eval NCCL_H := $(call find_cuda,nccl.h))$(NCCL_H)
NCCL_SO    = $(eval NCCL_SO := $(call find_cuda,libnccl.so nccl.h))$(NCCL_SO)
# The toolkit's own headers come first: those of the packages may be of another version.
cuda_include = $(if $(filter-out $(CUDA_HOME)/%,$(1)),\
                 -Xcompiler -idirafter -Xcompiler $(patsubst %/,%,$(dir $(1))))
cuda_library = $(if $(1),-Xlinker $(1) -Xlinker -rpath -Xlinker $(patsubst %/,%,$(dir $(1))))
NCCL_FLAGS = $(call cuda_include,$(NCCL_H))
NCCL_LIBS  = $(call cuda_library,$(NCCL_SO))
missing    = echo "error: $(1) is not found"; \
             echo "  hint: CUDA_HOME=DIR names the CUDA Toolkit (now $(CUDA_HOME)); or let" \
             "python3 find PyTorch's: pip install $(2)"; exit 1
GPU_FLAGS  = -std=c++17 $(NVCCFLAGS) $(GPU_CODE) -Xcompiler -Wall,-Wextra \
             $(if $(OMP),-Xcompiler $(OMP)) $(if $(filter 1,$(NCCL)),$(NCCL_FLAGS),-DNO_NCCL) \
             $(call cuda_include,$(CUBLAS_H))
GPU_LIBS   = $(call cuda_library,$(CUBLAS_SO)) -L$(CUDA_HOME)/lib64 \
             $(if $(filter 1,$(NCCL)),$(NCCL_LIBS)) -lm -lpthread
define nvcc
@mkdir -p $(@D)
@command -v $(NVCC) >/dev/null || \
    { echo "error: $(NVCC) is not found"; \
      echo "  hint: CUDA_HOME=DIR names the CUDA Toolkit (now $(CUDA_HOME))," \
          "NVCC=FILE its compiler"; \
      exit 1; }
@[ -n "$(CUBLAS_H)" ] || { $(call missing,cublasLt.h,nvidia-cublas); }
$(NVCC) $(GPU_FLAGS) $(1) -MMD -MP -MF $@.d -c $< -o $@
endef
define gpu_link
@[ -n "$(CUBLAS_SO)" ] || { $(call missing,libcublasLt.so,nvidia-cublas); }
$(NVCC) $(if $(OMP),-Xcompiler $(OMP)) $(filter %.o,$^) -o $@ $(GPU_LIBS)
endef

# ---- Tests ----

# Tests take longer to compile than to run.
TEST_O := -O1

# C++ is for the tests that run the GPU engine where there is no GPU, on dev/emu: the C compiler's
# own, if it has C++17.
ifeq ($(origin CXX),default)
CXX := $(CC)
endif
CXX_TEST  := printf '\043include <vector>\nint main() { std::vector<int> v(1); return v[0]; }\n'
cxx_probe = $(shell $(CXX_TEST) | \
              $(CXX) -std=c++17 -x c++ - -o /dev/null $(1) 2>/dev/null && echo '$(1)')
ifeq ($(EMULATE),1)
CXX_LIB := $(or $(call cxx_probe,-lstdc++),$(call cxx_probe,-lc++))
endif
ifneq ($(CXX_LIB),)
EMU := $(B)/test_emu.o
ifeq ($(REAL),float)
EMU += $(B)/test_cuda.o $(B)/test_nccl.o
EMU_TOOLS   := $(patsubst %,$(B)/%_emu,layers prune collapse)
EMU_PROGRAM := $(B)/train_gpt_emu $(EMU_TOOLS)
endif
endif
# No contraction: on every compiler the sums are those that the code says. These two sanitizers
# would need a C++ linker.
EMU_FLAGS = -std=c++17 $(CFLAGS) $(CLEAN) $(ARCH) -fno-math-errno -ffp-contract=off \
            -fno-strict-aliasing $(WARNINGS) -Wno-unknown-pragmas -x c++ -DCUDA_EMULATED \
            -Idev/emu -I. $(TEST_O) $(SANITIZE) \
            $(if $(SAN),-fno-sanitize=vptr $(call probe,-fno-sanitize=function))
define emu
@mkdir -p $(@D)
$(CXX) $(EMU_FLAGS) $(1) -MMD -MP -MF $@.d -c $< -o $@
endef

$(B)/test_emu.o: dev/test/test_emu.cu
	$(call emu)
# The engine and the tests of its kernels; with little memory for logits, so that there are several
# chunks of them.
$(B)/test_cuda.o: dev/test/test_cuda.cu
	$(call emu,-DLOGITS_BYTES='(1 << 18)' -DROWS_SCORES=4096 -DWORKSPACE_BYTES=65536)
$(B)/test_nccl.o: dev/test/test_nccl.cu
	$(call emu)
$(B)/engine_emu.o: train_gpt.cu
	$(call emu,-DENGINE_ONLY)
$(B)/main_emu.o: dev/main.c
	$(call cc,$(TEST_O) -DCUDA_BUILD)
$(B)/train_gpt_emu: $(B)/main_emu.o $(B)/engine_emu.o    # for whole runs of several ranks
	$(link) $(CXX_LIB)
$(EMU_TOOLS:%=%.o): $(B)/%_emu.o: dev/tools/%.c          # what analyzes hidden states
	$(call cc,$(TEST_O) -DCUDA_BUILD)
$(EMU_TOOLS): %: %.o $(B)/engine_emu.o
	$(link) $(CXX_LIB)

$(B)/engine_no_pairs.o: train_gpt.c              # for one test: dev/model/vector.h without pairs
	$(call cc,-DENGINE_ONLY -DNO_PAIRS -DCPU_ENGINE=no_pairs_engine)
$(B)/engine_no_tiles.o: train_gpt.c              # and with pairs, where the usual one has tiles
	$(call cc,-DENGINE_ONLY -DNO_TILES -DCPU_ENGINE=no_tiles_engine)
$(B)/test_gpt.o: test_gpt.c
	$(call cc,$(TEST_O) $(FAT_TABLE) $(if $(EMU),-DCUDA_EMULATED))
$(B)/interop_logits.o: dev/test/interop/logits.c
	$(call cc,$(TEST_O))
$(B)/torture.o: dev/torture/torture.c
	$(call cc,$(TEST_O) -DFAULTS)
$(B)/fuzz_replay.o: dev/fuzz/replay.c
	$(call cc,$(TEST_O))

TILES := $(findstring has_tiles,$(shell printf '\043include "dev/model/tiles.h"\n\043ifndef \
           NO_TILES\nhas_tiles\n\043endif\n' | $(CC) $(FLAGS) -I. -E -P -x c - 2>/dev/null))
PLAINER := $(B)/engine_no_pairs.o $(if $(TILES),$(B)/engine_no_tiles.o)
$(B)/test_gpt: $(if $(FAT_ENGINES),,$(PLAINER)) $(EMU)
TEST_PROGRAMS := $(B)/test_gpt $(B)/interop_logits $(B)/torture $(B)/fuzz_replay
# Some compilers want an engine for fuzz_replay, which calls none.
$(TEST_PROGRAMS): %: %.o $(ENGINES)
	$(link) $(if $(EMU),$(CXX_LIB))

# Everything that can be tested; ends with "N passed, N failed" and fails if any test does. TESTS
# takes those with names that this regular expression is in, NOT leaves some of them out:
# TESTS='^(engine|drop)_' NOT=many.
TESTED := $(PROGRAMS) $(B)/test_gpt $(B)/fuzz_replay $(B)/torture $(EMU_PROGRAM)
TESTS  ?=
NOT    ?=
# `value`: a $ of theirs is no variable of make's
CHOSEN  = $(RUN) $(B)/test_gpt --list | grep -E '$(or $(value TESTS),.)' | \
              grep -vE '$(or $(value NOT),^$$)'
test-programs: choices $(TESTED)
test: test-programs
	@names=$$($(if $(value TESTS)$(value NOT),$(CHOSEN),echo)) || \
	    { echo "error: no test has such a name; $(B)/test_gpt --list prints them"; exit 1; }; \
	BUILD="$(strip $(RUN) $(B))" $(RUN) $(B)/test_gpt $$names

# All tests that concern the GPU engine, on a GPU.
$(B)/test_gpt_cuda.o: test_gpt.c
	$(call cc,$(TEST_O) -DCUDA_BUILD)
$(B)/test_cuda_device.o: dev/test/test_cuda.cu
	$(call nvcc,-DLOGITS_BYTES='(1 << 18)' -DROWS_SCORES=4096)
$(B)/test_gpt_cuda: $(B)/test_gpt_cuda.o $(ENGINES) $(PLAINER) $(B)/test_cuda_device.o
	$(gpu_link)

test-cuda: choices $(B)/test_gpt_cuda
	@$(B)/test_gpt_cuda $$($(B)/test_gpt_cuda --list | grep -e ^engine_ -e ^cuda_ -e ^parity_)

# Every parser of outside bytes under libFuzzer, one after the other, FUZZ_RUNS inputs each; stops
# at the first finding. FUZZ="json shards" takes some of them, FUZZ_SECONDS=60 ends each after so
# long: dev/fuzz/README.md.
FUZZ_RUNS    ?= 10000000
FUZZ_SECONDS ?= 0
FUZZ_CC      ?= clang
FUZZ_FLAGS   := -std=c11 -O2 -g -Wall -Wextra -fsanitize=fuzzer,address,undefined \
                -fno-sanitize-recover=undefined -fno-omit-frame-pointer

$(B)/fuzz/parsers: dev/fuzz/fuzz.c
	@mkdir -p $(@D)
	$(FUZZ_CC) $(FUZZ_FLAGS) -MMD -MP -MF $@.d $< -o $@ -lm -pthread

fuzz: $(B)/fuzz/parsers $(B)/fuzz_replay
	@FUZZ_RUNS=$(FUZZ_RUNS) FUZZ_SECONDS=$(FUZZ_SECONDS) BUILD=$(B) sh dev/fuzz/run.sh $(FUZZ)

# Runs that are killed, or whose disk fails, at every call that changes the disk. Some minutes.
torture: choices $(B)/torture
	@OMP_WAIT_POLICY=passive $(RUN) $(B)/torture

# Hours of a small run that is stopped, killed and resumed: memory, metrics, steps and weights must
# come out as undisturbed.
SECONDS ?= 3600
soak: $(B)/train_gpt $(B)/data_bytes
	@python3 dev/torture/soak.py --build $(B) --seconds $(SECONDS)

# Our checkpoints in transformers and its checkpoints here: makes a virtual environment once, or
# takes VENV=/path of one.
test-interop: $(PROGRAMS) $(B)/interop_logits
	@BUILD="$(B)" VENV="$(VENV)" sh dev/test/interop/run.sh

# The Python programs of data/ and scripts/, in a virtual environment of what their tests need.
# GPT2_FILES=DIR, with GPT-2's encoder.json and vocab.bpe, tests its tokenizer where it cannot be
# downloaded; PYTHON=python3 names another Python that has what they need; VERBOSE=-v names skips.
VENV_TEST := build/venv-test
PYTHON    ?= $(VENV_TEST)/bin/python
VERBOSE   ?=
$(VENV_TEST)/bin/python: dev/test/requirements.txt data/requirements.txt scripts/requirements.txt
	@mkdir -p build; { python3 -m venv $(VENV_TEST) && $@ -m pip install -q -r $< && touch $@; } \
	    >$(VENV_TEST).log 2>&1 || { tail -n 3 $(VENV_TEST).log; rm -rf $(VENV_TEST); \
	      echo "error: cannot install $< in $(VENV_TEST)"; \
	      echo "  hint: it needs Python 3.9 or newer with venv, and a network; see $(VENV_TEST).log"; \
	      exit 1; }

test-data: $(B)/data_bytes $(filter $(VENV_TEST)/%,$(PYTHON))
	@BUILD=$(B) $(PYTHON) dev/test/test_data.py $(VERBOSE)
test-look: $(PROGRAMS) $(filter $(VENV_TEST)/%,$(PYTHON))
	@BUILD=$(B) $(PYTHON) -m unittest discover $(VERBOSE) -b -s dev/test -p 'test_look_*.py'

# Data races, by clang's ThreadSanitizer with an OpenMP runtime that it understands (dev/README.md,
# Threads).
test-threads:
	@sh dev/test/threads.sh $(TESTS)

# Installed into a temporary folder: every program runs there, and uninstall leaves nothing.
test-install: $(BUILT)
	@MAKE="$(MAKE)" B="$(B)" sh dev/test/install.sh

# Coverage of train_gpt.c and its headers by the tests (without the GPU engine); LINES=1 lists the
# lines they do not reach. gcc only.
COVERAGE_FLAGS := -O1 -g --coverage -fno-inline -fkeep-inline-functions -fkeep-static-functions
coverage:
	@rm -f build/coverage/*.gcda
	@$(MAKE) --no-print-directory CC=gcc B=build/coverage EMULATE=0 CFLAGS="$(COVERAGE_FLAGS)" test
	@python3 dev/test/coverage.py build/coverage $(if $(LINES),--lines)

# Whether the tests notice a changed operator, constant or statement in drop path and checkpoints.
mutate:
	@python3 dev/mutate/mutate.py --cc "$(CC)"

# Each header alone, as C11 and as C++17; cuda.h as nvcc would see it, or dev/emu.
SHELVES     := model run files
HEADERS     := $(filter-out dev/model/cuda.h,$(wildcard dev/*.h $(SHELVES:%=dev/%/*.h)))
EMU_HEADERS := $(if $(EMU),$(filter-out dev/emu/nccl.h,$(wildcard dev/emu/*.h)) dev/model/cuda.h)
headers:
	@for h in $(HEADERS); do \
	    for as in "$(CC) -std=c11 -x c" "$(CC) -std=c++17 -x c++"; do \
	        echo "#include \"$$h\"" | $$as -Wall -Wextra -Werror -Wno-unknown-pragmas -I. \
	            -fsyntax-only - || exit 1; \
	    done; \
	done; echo "headers: $(words $(HEADERS)) compile alone as C11 and as C++17"
	@for h in $(EMU_HEADERS); do \
	    echo "#include \"$$h\"" | $(CXX) $(EMU_FLAGS) -Werror -fsyntax-only - || exit 1; \
	done

# Of a fat build: each engine's instructions are in its object alone.
instructions: $(PROGRAMS) $(B)/test_gpt
	@BUILD=$(B) sh dev/test/fat.sh

# ---- Benchmarks ----

# Kernels, steps and drop path beside the machine's peaks, and memory, in about ten minutes:
# dev/bench/README.md. It includes train_gpt.c, to reach its kernels.
$(B)/bench.o: dev/bench/bench.c
	$(if $(FAT_ENGINES),$(error bench measures the one engine in it: MARCH=x86-64-v3, not FAT=1))
	$(call cc)
$(B)/gpu_summary.o: dev/bench/gpu_summary.c              # the last table of scripts/gpu_check.sh
	$(call cc)
$(B)/bench $(B)/gpu_summary: %: %.o
	$(link)
bench: choices $(B)/bench
	@$(B)/bench --json $(B)/bench.json

# What measures on a GPU; the same under the emulator, to try it where there is none.
$(B)/bench_cuda.o: dev/bench/bench_cuda.c
	$(call cc)
$(B)/kernels_cuda.o: dev/bench/kernels.cu                # includes train_gpt.cu for its kernels
	$(call nvcc)
$(B)/bench_cuda: $(B)/bench_cuda.o $(B)/engine_cuda.o
$(B)/kernels_cuda: $(B)/kernels_cuda.o
$(B)/bench_cuda $(B)/kernels_cuda:
	$(gpu_link)

$(B)/kernels_emu.o: dev/bench/kernels.cu
	$(call emu)
$(B)/shared_memory.o: dev/test/shared_memory.cu
	$(call emu,-O0)
$(B)/bench_emu: $(B)/bench_cuda.o $(B)/engine_emu.o
$(B)/kernels_emu $(B)/shared_memory: %: %.o
$(B)/bench_emu $(B)/kernels_emu $(B)/shared_memory:
	$(link) $(CXX_LIB)

# What nvcc made of every kernel, for each compute capability; shared memory of those that take much
# of it.
cuda-report: $(B)/shared_memory
	@echo "bytes of shared memory of a block, all of it given at the launch:"; $(B)/shared_memory
	@for a in $(GPU_ARCH); do \
	    echo "compute capability $$a:"; \
	    $(NVCC) -std=c++17 -O3 -arch=sm_$$a -Xptxas -v -DENGINE_ONLY -cubin -o $(B)/sm_$$a.cubin \
	        train_gpt.cu 2>$(B)/sm_$$a.txt || { cat $(B)/sm_$$a.txt; exit 1; }; \
	    python3 dev/test/cuda_report.py $(B)/sm_$$a.txt $(B)/sm_$$a.cubin || exit 1; \
	done

# The programs of scripts/gpu_check.sh, to be carried to a machine with a GPU of compute capability
# 9.0: for any x86-64 of the last ten years, in a folder of their own.
GPU_PROGRAMS := train_gpt_cuda test_gpt_cuda bench_cuda kernels_cuda data_bytes gpu_summary
gpu-programs:
	$(MAKE) B=build/gpu CUDA=1 GPU_ARCH=90 MARCH=x86-64-v3 $(GPU_PROGRAMS:%=build/gpu/%)

# The three calls of scripts/gpu_check.sh on the emulator: whether they go through, not how fast.
gpu-check-dry: $(B)/data_bytes $(B)/test_gpt $(B)/bench_emu $(B)/kernels_emu $(B)/train_gpt_emu \
               $(B)/gpu_summary
	@BUILD="$(B)" sh dev/test/gpu_check_dry.sh

DEV_TARGETS := test-programs test-cuda test-data test-look test-interop test-threads test-install \
               fuzz torture soak coverage mutate headers instructions cuda-report \
               gpu-programs gpu-check-dry
.PHONY: test bench $(DEV_TARGETS)
