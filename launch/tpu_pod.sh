#!/usr/bin/env bash
# A run on a TPU pod: makes the pod (as a queued resource), installs on all its hosts, runs a verb on
# them, and gives the pod back. Every step can be repeated. `run` starts and follows it; the run itself
# needs no connection and writes blip/run.log on each host.
#
#   export PROJECT=my-project ZONE=us-central2-b POD=blip TYPE=v4-32
#   bash launch/tpu_pod.sh create            asks for the pod and waits until it is there
#   bash launch/tpu_pod.sh install           copies this repository to all hosts and installs it
#   bash launch/tpu_pod.sh run train --config configs/paper_vicuna_7b.py --config.workdir=/shared/blip
#   bash launch/tpu_pod.sh log               follows the run's log on the first host until it ends
#   bash launch/tpu_pod.sh stop              SIGTERM: all hosts save the same step and end
#   bash launch/tpu_pod.sh delete
#   bash launch/tpu_pod.sh --dry_run run train ...          prints the commands, runs nothing
#
#   VERSION  of the TPU's software (default: by TYPE)
#   SPOT=1   a pod that may be taken back: the run saves then; `create` and `run` go on
set -euo pipefail
dry=
if [[ ${1:-} == --dry_run ]]; then dry=1; shift; fi
: "${PROJECT:?set PROJECT, ZONE, POD (any name) and TYPE (v4-32, v5litepod-16, v5p-32, v6e-16)}"
: "${ZONE:?}" "${POD:?}" "${TYPE:?}"
case $TYPE in
  v5litepod*) version=v2-alpha-tpuv5-lite ;;
  v5p*) version=v2-alpha-tpuv5 ;;
  v6e*) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
esac
version=${VERSION:-$version}
place=(--project "$PROJECT" --zone "$ZONE")

call() { # runs a command, or prints it
  if [[ -n $dry ]]; then echo "${*@Q}"; else "$@"; fi
}
on_all() { call gcloud compute tpus tpu-vm ssh "$POD" "${place[@]}" --worker=all --command "$1"; }
on_first() { call gcloud compute tpus tpu-vm ssh "$POD" "${place[@]}" --worker=0 --command "$1"; }
# shellcheck disable=SC2016 # the host's own $(...)
follow='cd blip && tail -n +1 --pid="$(cat run.pid)" -F run.log'

verb=${1:-}
shift || true
case $verb in
  create)
    spot=()
    if [[ ${SPOT:-} == 1 ]]; then spot=(--spot); fi
    call gcloud compute tpus queued-resources create "$POD" "${place[@]}" --node-id "$POD" \
      --accelerator-type "$TYPE" --runtime-version "$version" "${spot[@]}"
    if [[ -n $dry ]]; then exit; fi
    until [[ $(gcloud compute tpus queued-resources describe "$POD" "${place[@]}" \
      --format 'value(state.state)') == ACTIVE ]]; do
      echo "$(date +%T) waiting for $POD"
      sleep 30
    done
    ;;
  install)
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    call git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --output "$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$POD:blip.tar.gz" "${place[@]}" --worker=all
    # The images' own Python is older than the package takes (3.10), so uv brings one.
    on_all "mkdir -p blip && tar -xzf blip.tar.gz -C blip && cd blip && \
python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && \
python3 -m uv pip install --quiet --python .venv -e '.[tpu,gcs]'"
    ;;
  run)
    on_all "cd blip && if [[ -e run.pid ]] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then \
echo 'a run is going on: stop it first, or follow it with log' >&2; exit 1; fi && \
(setsid nohup .venv/bin/python -m jax_instructblip ${*@Q} --coordinator auto \
>run.log 2>&1 </dev/null & echo \$! >run.pid)"
    on_first "$follow"
    ;;
  log) on_first "$follow" ;;
  stop) on_all "pkill -TERM -f '[j]ax_instructblip' || true" ;;
  delete) call gcloud compute tpus queued-resources delete "$POD" "${place[@]}" --force --quiet ;;
  *)
    echo "usage: bash launch/tpu_pod.sh [--dry_run] create | install | run VERB ... | log | stop | delete" >&2
    exit 2
    ;;
esac
