#!/usr/bin/env bash
# A pod on this machine: N processes with M devices each work on one run, as the hosts of a pod do.
#
#   bash launch/local_pod.sh 2 4 train --config configs/quickstart.py --config.workdir=runs/pod
#   bash launch/local_pod.sh --dry_run 2 4 train ...      prints the commands, runs nothing
#
# The devices are parts of this machine's CPU: it shows that a run works on many hosts, not how fast.
# Ctrl-C or SIGTERM is passed on: all processes save the same step and end; the same command goes on.
# A second Ctrl-C ends them at once.
#
#   PORT    of process 0 (default: a free one; the next one is used, too)
#   GRACE   seconds that the others have to end when one has failed (default: 60)
#   EXTRAS  extras to install
set -euo pipefail
dry=
if [[ ${1:-} == --dry_run ]]; then dry=1; shift; fi
if (($# < 3)) || [[ ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/local_pod.sh [--dry_run] PROCESSES DEVICES VERB ..." >&2
  exit 2
fi
count=$1 devices=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ -n $dry ]]; then
  for ((i = 0; i < count; i++)); do
    echo "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices JAX_COORDINATOR_ADDRESS=localhost:${PORT:-PORT}" \
      "JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i jax-instructblip ${*@Q}"
  done
  exit
fi

prepare "${EXTRAS:-}"
# Below the ports that the system gives to outgoing connections, of which one might come first.
free_port='
import random, socket
while True:
    port = random.randrange(20_000, 32_000)
    try:
        with socket.create_server(("", port)), socket.create_server(("", port + 1)):
            print(port)
            break
    except OSError:
        continue'
port=${PORT:-$("$python" -c "$free_port")}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

processes=()
for ((i = 0; i < count; i++)); do
  # A group of its own: Ctrl-C reaches it once, through this script.
  JAX_PROCESS_ID=$i setsid "$python" -m jax_instructblip "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
  processes+=($!)
done
signal=-TERM
trap 'kill "$signal" "${processes[@]}" 2>/dev/null || true; signal=-KILL' INT
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM

# The first failure ends the others, which may still write out a checkpoint.
code=0 left=$count
while ((left)); do
  status=0
  wait -n -p ended "${processes[@]}" || status=$?
  if [[ -z ${ended:-} ]]; then continue; fi # a signal came, not an end
  remaining=()
  for process in "${processes[@]}"; do
    if [[ $process != "$ended" ]]; then remaining+=("$process"); fi
  done
  processes=("${remaining[@]}")
  left=${#processes[@]}
  if ((status && !code)); then
    code=$status
    echo "a process ended with $status: the others are stopped" >&2
    if ((left)); then
      for ((waited = 0; waited < ${GRACE:-60}; waited++)); do # they end by themselves
        kill -0 "${processes[@]}" 2>/dev/null || break
        sleep 1
      done
      kill -KILL "${processes[@]}" 2>/dev/null || true
    fi
  fi
done
exit "$code"
