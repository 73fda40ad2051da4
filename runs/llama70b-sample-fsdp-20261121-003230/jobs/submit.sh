#!/bin/bash
# Submits every job of /work/main/runs/llama70b-sample-fsdp-20261121-003230, each after those it reads from.
set -euo pipefail
preprocess=$(sbatch --parsable /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/preprocess.sbatch)
echo "preprocess ${preprocess%%;*}"
train=$(sbatch --parsable --dependency=afterok:"${preprocess%%;*}" /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/train.sbatch)
echo "train ${train%%;*}"
consolidate=$(sbatch --parsable --dependency=afterok:"${train%%;*}" /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/consolidate.sbatch)
echo "consolidate ${consolidate%%;*}"
evaluate=$(sbatch --parsable --dependency=afterok:"${preprocess%%;*}":"${consolidate%%;*}" /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/evaluate.sbatch)
echo "evaluate ${evaluate%%;*}"
generate=$(sbatch --parsable --dependency=afterok:"${consolidate%%;*}" /work/main/runs/llama70b-sample-fsdp-20261121-003230/jobs/generate.sbatch)
echo "generate ${generate%%;*}"

