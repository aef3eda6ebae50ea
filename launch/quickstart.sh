#!/usr/bin/env bash
# Tunes a Q-Former on the world the package draws, evaluates it on images it never saw and writes
# runs/quickstart/report.html.
#
#   bash launch/quickstart.sh              five minutes on two idle cores, downloads included
#   bash launch/quickstart.sh --config.train.steps=500        any fields of configs/quickstart.py
#
#   WORKDIR  the run's folder (default: runs/quickstart). An interrupted run in it is taken up where
#            its last checkpoint stands; a finished one is only evaluated again.
#   FRESH=1  moves what is in WORKDIR aside and starts over
#   EXTRAS   extras to install: EXTRAS=gpu on a machine with a GPU, EXTRAS=tpu on a TPU
set -euo pipefail
for word in "$@"; do
  if [[ $word != --config.* && $word != -h && $word != --help ]]; then
    echo "launch/quickstart.sh takes --config.FIELD=VALUE alone, found $word" >&2
    exit 2
  fi
done
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

workdir=runs/quickstart
if [[ -n ${WORKDIR:-} ]]; then
  case $WORKDIR in /*) workdir=$WORKDIR ;; *) workdir=$here/$WORKDIR ;; esac
fi
if [[ -e $workdir ]]; then
  if [[ ${FRESH:-} == 1 ]]; then
    aside=$workdir.$(date +%Y%m%d-%H%M%S)
    mv "$workdir" "$aside"
    echo "the earlier run is now $aside"
  elif (($#)); then
    echo "$workdir already holds a run, perhaps with other settings than $*:" \
      "start over with FRESH=1, or name another folder with WORKDIR=" >&2
    exit 1
  else
    echo "$workdir already holds a run: taking it up where it stands (FRESH=1 starts over)"
  fi
fi

prepare "${EXTRAS:-}"
trap 'exit 130' INT # after Ctrl-C the training saves and ends: nothing is evaluated then
"$python" -m jax_instructblip train --config configs/quickstart.py --config.workdir="$workdir" "$@"
"$python" -m jax_instructblip evaluate --checkpoint "$workdir" --out "$workdir"
echo "
a few questions about images it never saw (\`text\` is its answer, \`answers\` the truth):"
head -n 6 "$workdir/predictions/test.jsonl"
echo "open $workdir/report.html"
