#!/usr/bin/env bash
# Manages one TPU slice: creates it, trains on it, and deletes it.
#
#   tpu_scripts/tpu.sh VERB NAME --zone=ZONE [option...] [-- flags of gecko train...]
#
#   create   creates the slice: --type=v5litepod-256, optionally --spot and --queued
#   setup    installs this clone on every host; --bucket=NAME mounts it at /mnt/bucket
#   train    starts `gecko train --distributed` on every host, in the background
#   logs     follows the log of host 0
#   status   prints the state of the slice
#   resume   after a preemption: recreates the slice if it is gone, then trains
#   sync     copies a folder of host 0 to a bucket: --from=DIR --to=gs://BUCKET/DIR
#   stop     sends SIGTERM to every host; the run saves a checkpoint and ends
#   delete   deletes the slice, and its queued request with --queued
#
#   --dry-run prints the commands without running them; --project=ID, --version=RUNTIME.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "tpu.sh: $1" >&2
  exit 2
}

usage() {
  sed -n '2,17s/^# \{0,1\}//p' tpu_scripts/tpu.sh
}

(($# > 0)) || { usage >&2 && exit 2; }
case $1 in -h | --help) usage && exit 0 ;; esac
(($# > 1)) || fail "name the slice: tpu_scripts/tpu.sh $1 NAME --zone=ZONE"
verb=$1 name=$2
shift 2

zone='' type='' spot='' queued='' bucket='' from='' to='' project='' version='' dry=''
while (($# > 0)); do
  case $1 in
  --zone=*) zone=${1#*=} ;;
  --type=*) type=${1#*=} ;;
  --bucket=*) bucket=${1#*=} ;;
  --from=*) from=${1#*=} ;;
  --to=*) to=${1#*=} ;;
  --project=*) project=${1#*=} ;;
  --version=*) version=${1#*=} ;;
  --spot) spot=yes ;;
  --queued) queued=yes ;;
  --dry-run) dry=yes ;;
  --) shift && break ;;
  *) fail "unknown option $1; see tpu_scripts/tpu.sh --help" ;;
  esac
  shift
done
[[ -n $zone ]] || fail "--zone is missing, such as --zone=us-west4-a"
where=("--zone=$zone")
if [[ -n $project ]]; then where+=("--project=$project"); fi

# Prints a command with shell quoting, and runs it unless --dry-run is given.
run() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ -n $dry ]] || "$@"
}

tpu() { run gcloud compute tpus "$@" "${where[@]}"; }

# Runs a command on all hosts, or on host 0.
on_hosts() { tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }

runtime() {
  case $type in
  v4-*) echo tpu-ubuntu2204-base ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  *) fail "--type=$type: give an accelerator type, such as v5litepod-16 or v5p-128" ;;
  esac
}

create() {
  local flags=("--accelerator-type=$type") image
  image=${version:-$(runtime)}
  if [[ -n $spot ]]; then flags+=(--spot); fi
  if [[ -n $queued ]]; then
    tpu queued-resources create "$name" "--node-id=$name" \
      "--runtime-version=$image" "${flags[@]}"
  else
    tpu tpu-vm create "$name" "--version=$image" "${flags[@]}"
  fi
}

setup() {
  # Copies the commit; uncommitted changes do not reach the hosts.
  run git archive --format=tar.gz --prefix=gecko_jax/ --output=/tmp/gecko_jax.tar.gz HEAD
  tpu tpu-vm scp /tmp/gecko_jax.tar.gz "$name:" --worker=all
  local install='tar xzf gecko_jax.tar.gz && cd gecko_jax && '
  install+='{ command -v python3.11 >/dev/null || { sudo apt-get -qq update && '
  install+='sudo apt-get -qq install -y python3.11-venv; }; } && '
  install+='python3.11 -m venv .venv && .venv/bin/pip install -q -e ".[tpu,tokenizers]"'
  on_hosts all "$install"
  if [[ -n $bucket ]]; then
    on_hosts all "mountpoint -q /mnt/bucket || { sudo mkdir -p /mnt/bucket && \
sudo chown \$USER /mnt/bucket && gcsfuse --implicit-dirs $(printf %q "$bucket") \
/mnt/bucket; }"
  fi
}

train() {
  (($# > 0)) || fail "train: give the flags of gecko train after --"
  local flags
  flags=$(printf '%q ' "$@")
  # Quoted twice, because the flags pass through a shell here and one on the host.
  # `exec` replaces the shell, whose command line `stop` would match as well.
  on_hosts all "cd gecko_jax && exec nohup .venv/bin/gecko train --distributed \
${flags% } >~/gecko.log 2>&1 </dev/null & echo started"
}

state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' \
    2>/dev/null || echo GONE
}

delete() {
  if [[ -n $queued ]]; then
    tpu queued-resources delete "$name" --force --quiet
  else
    tpu tpu-vm delete "$name" --quiet
  fi
}

resume() {
  (($# > 0)) || fail "resume: give the flags of gecko train after --, as before"
  [[ -n $type ]] || fail "resume: give --type, as before: the slice may be gone"
  local now=PREEMPTED
  if [[ -z $dry ]]; then now=$(state); fi
  echo "$name is $now"
  if [[ $now != READY ]]; then
    if [[ $now != GONE ]]; then delete; fi
    create
    if [[ -n $queued ]]; then
      echo "queued: run resume again when \`status\` prints READY"
      [[ -n $dry ]] || exit 0
    fi
    setup
  fi
  train "$@"
}

case $verb in
create) create ;;
setup) setup ;;
train) train "$@" ;;
logs) on_hosts 0 'tail -n 100 -F gecko.log' ;;
status) tpu tpu-vm describe "$name" '--format=value(state)' ;;
resume) resume "$@" ;;
sync)
  [[ -n $from && $to == gs://* ]] || fail "sync: give --from=DIR and --to=gs://BUCKET/DIR"
  on_hosts 0 "gcloud storage rsync --recursive $(printf '%q %q' "$from" "$to")"
  ;;
stop)
  # The pattern [g]ecko does not match this command itself. Waits for the run to end.
  on_hosts all "pkill -TERM -o -f '[g]ecko train'; \
while pgrep -f '[g]ecko train' >/dev/null; do sleep 1; done"
  ;;
delete) delete ;;
*) fail "unknown verb $verb; see tpu_scripts/tpu.sh --help" ;;
esac
