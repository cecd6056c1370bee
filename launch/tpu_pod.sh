#!/usr/bin/env bash
# Start a launcher on all workers of a TPU pod slice; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Start a launcher on all workers of a TPU pod slice, as one run.

  launch/tpu_pod.sh [OPTIONS] POD ZONE LAUNCHER [FLAGS...]
  launch/tpu_pod.sh my-pod us-central2-b launch.safepatch --config=configs/llama2_7b_chat.py --mesh=fsdp:-1,tensor:4 \
      --model.source=/mnt/shared/llama2 --workdir=/mnt/shared/runs/llama2 --run.cache_dir=/mnt/shared/cache

  POD, ZONE   the slice, as gcloud lists it: gcloud compute tpus tpu-vm list --zone=ZONE
  LAUNCHER    one of launch.safepatch, align, sweep, slopes, compare, continual, evaluate, margins, convert; --distributed is added
  --project=P the project, where it is not gcloud's default
  --dir=DIR   where this repository and its .venv lie on every worker [safepatch_jax, in the home folder]
  --print     print the command and start nothing

Model, data, --workdir (or --out, --target) and --run.cache_dir must lie on a file system that all workers share, under the
same path: a Filestore (NFS) share, or a bucket mounted with gcsfuse. Worker 0 prints; the exit code is gcloud's.
Install once on all workers:

  gcloud compute tpus tpu-vm ssh POD --zone=ZONE --worker=all --command='cd safepatch_jax && python3 -m venv .venv &&
      .venv/bin/pip install -r requirements.txt "jax[tpu]"'
TEXT
}

fail() {
  printf 'error: %s See launch/tpu_pod.sh --help.\n' "$1" >&2
  exit 2
}

dir=safepatch_jax
only_print=
gcloud_options=()
while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --print) only_print=yes ;;
    --dir=?*) dir=${1#--dir=} dir=${dir#\~/} ;; # the home folder is where the command starts
    --project=?*) gcloud_options+=("$1") ;;
    *) fail "unknown option '$1'; the options of this script come before POD, those of the launcher after LAUNCHER." ;;
  esac
  shift
done
[[ $# -ge 3 ]] || fail "POD, ZONE and LAUNCHER are needed, $# of them are given."
pod=$1 zone=$2 launcher=$3
shift 3
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "'$zone' is no zone, such as us-central2-b."
case $launcher in
  launch.safepatch | launch.align | launch.sweep | launch.slopes | launch.compare | launch.continual) ;;
  launch.evaluate | launch.margins | launch.convert) ;;
  *) fail "'$launcher' is not one of launch.safepatch, align, sweep, slopes, compare, continual, evaluate, margins, convert." ;;
esac
for flag in "$@"; do
  case $flag in
    --workdir=/* | --out=/* | --run.cache_dir=/* | --target=orbax:/* | --target=hf:/*) ;;
    --workdir* | --out* | --run.cache_dir* | --target*)
      fail "'$flag' is not --flag=/PATH: every worker has its own folders; give an absolute path on a shared file system." ;;
    --coordinator* | --num_processes* | --process_id*) fail "'$flag' is not needed: the workers find one another." ;;
  esac
done

printf -v command '%q ' .venv/bin/python -m "$launcher" --distributed "$@"
printf -v command 'cd %q && %s' "$dir" "${command% }"
start=(gcloud compute tpus tpu-vm ssh "$pod" --zone="$zone" ${gcloud_options[@]+"${gcloud_options[@]}"} --worker=all --command="$command")
if [[ $only_print ]]; then
  printf '%q ' "${start[@]}"
  printf '\n'
  exit 0
fi
command -v gcloud > /dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install."
exec "${start[@]}"
