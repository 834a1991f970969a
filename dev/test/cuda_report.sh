# cuda_report.sh: from what ptxas -v says, one line for each kernel: registers, bytes of spills,
# bytes of its own memory. Shared memory is given at the launch: shared_memory.cu prints it.
awk '/Compiling entry function/ {
         name = $0; sub(/^[^\047]*\047/, "", name); sub(/\047 for.*/, "", name)
     }
     /bytes stack frame/ {
         stack = $1; for (i = 1; i <= NF; i++) if ($i == "spill") { spill += $(i - 2) }
     }
     /Used [0-9]+ registers/ { for (i = 1; i <= NF; i++) if ($i == "Used") registers = $(i + 1)
         sub(/^void /, "", name); sub(/\(.*/, "", name)
         printf "  %4d %6d %6d  %s\n", registers, spill, stack, name
         spilled += spill; spill = 0; kernels++ }
     END { printf "  %d kernels, %d bytes spilled\n", kernels, spilled; exit !kernels }'
