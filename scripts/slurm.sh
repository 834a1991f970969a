#!/bin/sh
#SBATCH --job-name=fineweb124m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fineweb124m-%j.log
# GPT-2 124M on FineWeb on two machines of eight GPUs, as a Slurm job. From the repository's root:
#
#     ONLY=data sh scripts/fineweb124m.sh     first, where there is a network: 28 GB of downloads
#     sbatch scripts/slurm.sh                 the two runs, with and without drop path, and their
#                                             table
#
#   cost     see scripts/fineweb124m.sh for the arithmetic; each of the 16 GPUs runs one micro-batch
#            per step. At an assumed 50 % of the peak, without network losses, 17 minutes per run on
#            H100, 53 on A100. Nothing has run on GPUs yet
#   result   as there: a step is summed over 16 ranks in another order, on the same data
#
# Partition, account and the like come from the command line, which overrides the lines above:
# sbatch --partition=gpu --account=me scripts/slurm.sh. All machines must see this folder. The job
# continues where it was interrupted. To test a cluster on CPUs:
#
#     SCALE=tiny TEXT=/path sbatch --gpus-per-node=0 --ntasks-per-node=2 scripts/slurm.sh
#
# (tested on Slurm 22.05 with two nodes). If NCCL finds no network: NCCL_SOCKET_IFNAME=ib0 sbatch
# ...
set -eu
if [ -z "${SLURM_NTASKS:-}" ]; then
    echo "error: this is a job of Slurm" >&2
    echo "  hint: sbatch scripts/slurm.sh" >&2
    exit 1
fi
if [ -z "${MASTER_ADDR:-}" ]; then                       # rank 0 is on the first machine; the job
                                                         # number is the token
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
# since Slurm 22.05, srun no longer takes it from the job
export MASTER_ADDR SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
GPUS=$SLURM_NTASKS LAUNCH="srun --kill-on-bad-exit=1" sh scripts/fineweb124m.sh
