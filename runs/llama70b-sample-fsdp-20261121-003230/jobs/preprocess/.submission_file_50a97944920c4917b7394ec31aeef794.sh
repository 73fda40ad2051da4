#!/bin/bash

# Parameters
#SBATCH --chdir=/work/main/runs/llama70b-sample-fsdp-20261121-003230/code
#SBATCH --cpus-per-task=16
#SBATCH --job-name=llama70b-sample-fsdp/preprocess
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=128G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/preprocess/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=240

# setup
set -o pipefail
export MUSTER_RUN=/work/main/runs/llama70b-sample-fsdp-20261121-003230
export MUSTER_JOB=preprocess
export MUSTER_CONFIG=d1819a39bd347915
export PYTHONPATH=/work/main/runs/llama70b-sample-fsdp-20261121-003230/code
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=16
export SRUN_CPUS_PER_TASK=16
export SLURM_EXPORT_ENV=ALL
# open the next attempt
exec {muster}< <(exec /tmp/x/v/bin/python -m launcher.attempt begin /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/preprocess)
line=
while read -r line <&"$muster" && [ "$line" != ready ]; do export "${line?}"; done
[ "$line" = ready ] || exit 2

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/preprocess/%j_%t_log.out --kill-on-bad-exit=1 --wait=60 /tmp/x/v/bin/python -u -m submitit.core._submit /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/preprocess


# teardown
/tmp/x/v/bin/python -m launcher.attempt finish /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/preprocess --code $? --world-size 1