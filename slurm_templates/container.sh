#!/bin/bash
# Runs one rank in a container: container.sh PROGRAM NAMES gpus|no-gpus [ARGUMENT OF exec]... IMAGE COMMAND...
# PROGRAM is a program, or `auto`: the node's apptainer or singularity. NAMES are variables, separated by commas, that reach the
# container with the values that they have here, whatever the image sets.
set -u
program=$1 names=",$2," gpus=$3
shift 3
if [ "$program" = auto ]; then
  program=$(command -v apptainer || command -v singularity) || program=apptainer
fi
if ! version=$("$program" --version 2>&1); then
  echo "muster: cluster.container: $program cannot be started on $(uname -n): $version" >&2
  echo "muster: load its module (cluster.modules), or set cluster.container.program to its path" >&2
  exit 2
fi
case $version in
  apptainer*) prefix=APPTAINERENV_ ;;
  *) prefix=SINGULARITYENV_ ;;
esac
# A variable with this prefix passes even with --cleanenv. Without Slurm's variables every rank would be rank 0 of 1.
for name in $(compgen -e); do
  case $name in
    SLURM* | SUBMITIT* | MUSTER_* | MASTER_* | *_VISIBLE_DEVICES) export "$prefix$name=${!name}" ;;
    *) case $names in *",$name,"*) export "$prefix$name=${!name}" ;; esac ;;
  esac
done
if [ "$gpus" = gpus ]; then
  if [ -e /dev/kfd ]; then set -- --rocm "$@"; else set -- --nv "$@"; fi
fi
exec "$program" exec "$@"
