#!/usr/bin/env bash
# Runs `gecko train` with the given flags on the host of a TPU VM.
#
#   tpu_scripts/train.sh NAME ZONE --config=... --workdir=DIR
#
# GECKO_DIR is where the repository lies on the host (default: gecko_jax).
set -euo pipefail

if (($# < 3)); then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# Quoted once more: the flags pass through a second shell, on the host.
flags=$(printf '%q ' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ${GECKO_DIR:-gecko_jax} && .venv/bin/gecko train $flags"
