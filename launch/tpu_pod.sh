#!/usr/bin/env bash
# Start a launcher on all workers of a TPU pod slice; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Start a launcher on all workers of a TPU pod slice, as one run.

  launch/tpu_pod.sh [OPTIONS] POD ZONE LAUNCHER [FLAGS...]
  launch/tpu_pod.sh my-pod us-central2-b launch.safepatch --config=configs/llama2_7b_chat.py --mesh=fsdp:-1,tensor:4 \
      --model.source=/mnt/shared/llama2 --workdir=/mnt/shared/runs/llama2 --run.cache_dir=/mnt/shared/cache

  POD, ZONE   the slice, as gcloud lists it: gcloud compute tpus tpu-vm list --zone=ZONE; of several slices of one queued
              resource all names, with commas between (--mesh=data:2,... for two)
  LAUNCHER    one of launch.safepatch, align, sweep, slopes, compare, continual, evaluate, margins, convert; --distributed is added
  --project=P          the project, where it is not gcloud's default
  --dir=DIR            where this repository and its .venv lie on every worker [safepatch_jax, in the home folder]
  --env=NAME=VALUE     a variable of the run on every worker; as often as wanted
  --internal-ip        reach workers that have no external address, from a machine of their network
  --tunnel             reach such workers from anywhere, through the Identity-Aware Proxy
  --detach=LOG         leave the run to itself: it goes on when this command or the connection ends; every worker writes
                       its console to LOG (process 0's is worth reading), and the number of its process to LOG.pid
  --print              print the command and start nothing

--workdir (or --out, --target) and --run.cache_dir lie in a bucket (gs://BUCKET/..., docs/buckets.md), model and data
too or under the same path on every worker; or all on a file system that the workers share, under the same path: a
Filestore (NFS) share, or a bucket mounted with gcsfuse that was made with a hierarchical namespace (folders are renamed,
which flat buckets cannot). Of launch.compare the workdir, and --target=orbax:, take no bucket's address: the shared file
system alone. Worker 0 prints; the exit code is gcloud's. The same command resumes a run.
A detached run is watched, and ended with a checkpoint, by

  gcloud compute tpus tpu-vm ssh POD --zone=ZONE --worker=0 --command='tail -f LOG'
  gcloud compute tpus tpu-vm ssh POD --zone=ZONE --worker=0 --command='kill -TERM $(cat LOG.pid)'

Install once on all workers:

  gcloud compute tpus tpu-vm ssh POD --zone=ZONE --worker=all --command='cd safepatch_jax && python3 -m venv .venv &&
      .venv/bin/pip install -r requirements.txt "jax[tpu]" gcsfs'
TEXT
}

fail() {
  printf 'error: %s See launch/tpu_pod.sh --help.\n' "$1" >&2
  exit 2
}

dir=safepatch_jax
only_print=
log=
variables=()
gcloud_options=()
while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --print) only_print=yes ;;
    --dir=?*) dir=${1#--dir=} dir=${dir#\~/} ;; # the home folder is where the command starts
    --detach=?*) log=${1#--detach=} log=${log#\~/} ;;
    --project=?*) gcloud_options+=("$1") ;;
    --internal-ip) gcloud_options+=("$1") ;;
    --tunnel) gcloud_options+=(--tunnel-through-iap) ;;
    --env=*)
      [[ $1 =~ ^--env=[A-Za-z_][A-Za-z0-9_]*= ]] || fail "'$1' is not --env=NAME=VALUE."
      variables+=("${1#--env=}")
      ;;
    *) fail "unknown option '$1'; the options of this script come before POD, those of the launcher after LAUNCHER." ;;
  esac
  shift
done
[[ $# -ge 3 ]] || fail "POD, ZONE and LAUNCHER are needed, $# of them are given."
pods=$1 zone=$2 launcher=$3
shift 3
[[ $pods =~ ^[a-z0-9-]+(,[a-z0-9-]+)*$ ]] || fail "'$pods' is no name of a slice, nor several with commas between."
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "'$zone' is no zone, such as us-central2-b."
needs_cache=
case $launcher in
  launch.safepatch | launch.align | launch.sweep | launch.slopes | launch.compare | launch.continual) needs_cache=yes ;;
  launch.evaluate | launch.margins | launch.convert) ;;
  *) fail "'$launcher' is not one of launch.safepatch, align, sweep, slopes, compare, continual, evaluate, margins, convert." ;;
esac
for flag in "$@"; do
  case $flag in
    --run.cache_dir=/* | --run.cache_dir=*://*) needs_cache= ;;
    --workdir=/* | --out=/* | --target=orbax:/* | --target=hf:/*) ;;
    --workdir=*://* | --out=*://* | --target=*://*) ;; # the launcher says which it can
    --workdir* | --out* | --run.cache_dir* | --target*)
      fail "'$flag' is not --flag=/PATH: every worker has its own folders; give an absolute path on a shared file system." ;;
    --coordinator* | --num_processes* | --process_id*) fail "'$flag' is not needed: the workers find one another." ;;
  esac
done
[[ -z $needs_cache ]] || fail "--run.cache_dir=/PATH is needed: by default every worker has its own, in its home folder."

words=(.venv/bin/python -m "$launcher" --distributed "$@")
[[ ${#variables[@]} -eq 0 ]] || words=(env "${variables[@]}" "${words[@]}")
printf -v command '%q ' "${words[@]}"
command=${command% }
if [[ $log ]]; then # nohup: the end of the connection is no end of the run
  printf -v log '%q' "$log"
  [[ $log == /* ]] || log="\"\$HOME\"/$log"
  command="{ nohup $command > $log 2>&1 < /dev/null & } && echo \$! > $log.pid"
fi
printf -v command 'cd %q && %s' "$dir" "$command"

IFS=, read -r -a slices <<< "$pods"
starts=()
for slice in "${slices[@]}"; do
  start=(gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" ${gcloud_options[@]+"${gcloud_options[@]}"} --worker=all --command="$command")
  printf -v line '%q ' "${start[@]}"
  starts+=("$line")
done
if [[ $only_print ]]; then
  printf '%s\n' "${starts[@]}"
  exit 0
fi
command -v gcloud > /dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install."
[[ ${#slices[@]} -gt 1 ]] || exec "${start[@]}"

running=()
for line in "${starts[@]}"; do
  eval "$line &" # words that printf has quoted
  running+=($!)
done
trap 'kill "${running[@]}" 2> /dev/null || true' INT TERM
code=0
for process in "${running[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
