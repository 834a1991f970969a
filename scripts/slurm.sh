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
# GPT-2 124M on FineWeb on two machines of eight GPUs, as a job of Slurm. From the folder of the sources:
#
#     ONLY=data sh scripts/fineweb124m.sh               first, where there is a network: the shards, 28 GB of downloads
#     sbatch scripts/slurm.sh                           the two runs, with drop path and without, and their table
#
#   cost     scripts/fineweb124m.sh has the arithmetic: 16 GPUs take one micro-batch of a step each. At an assumed 50 % of the
#            sheet's peak, without loss by the network, 17 minutes a run on H100, 53 on A100. Nothing has run on GPUs yet
#   result   as there: the sums of a step are taken over 16 ranks in another order, the data are the same
#
# Partition, account and the like come from the command line, which wins over the lines above: sbatch --partition=gpu
# --account=me scripts/slurm.sh. All machines must see this folder. The job goes on where it was interrupted. To see
# whether a cluster does it all, on CPUs: SCALE=tiny TEXT=/path sbatch --gpus-per-node=0 --ntasks-per-node=2 scripts/slurm.sh
# (on Slurm 22.05 of two nodes: tried so). NCCL that finds no network: NCCL_SOCKET_IFNAME=ib0 sbatch ...
set -eu
if [ -z "${SLURM_NTASKS:-}" ]; then
    echo "error: this is a job of Slurm" >&2
    echo "  hint: sbatch scripts/slurm.sh" >&2
    exit 1
fi
if [ -z "${MASTER_ADDR:-}" ]; then                       # rank 0 is on the first machine; the job's number is the token
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export MASTER_ADDR SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"    # srun no longer takes it from the job since 22.05
GPUS=$SLURM_NTASKS LAUNCH="srun --kill-on-bad-exit=1" sh scripts/fineweb124m.sh
