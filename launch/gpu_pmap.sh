#!/usr/bin/env bash
# Tunes on the GPUs of this machine under jax.pmap: each holds whole copies of weights and moments, and
# works on its rows of every batch.
#
#   bash launch/gpu_pmap.sh --config configs/custom_jsonl.py --config.model.checkpoint=checkpoints/mine
#   bash launch/gpu_pmap.sh --dry_run --config ...      prints the command, runs nothing
#
#   GPUS     which ones, as in 0,1,2,3 (default: all); config.data.batch_size is of all together
#   EXTRAS   extras to install (default: gpu; EXTRAS= for none)
#
# A model that does not fit one GPU is tuned without this script, its weights split over them:
#
#   jax-instructblip train --config ... --config.mesh.data=1 --config.mesh.fsdp=-1
set -euo pipefail
dry=
if [[ ${1:-} == --dry_run ]]; then dry=1; shift; fi
if [[ " $*" != *" --config"[=\ ]* ]]; then
  echo "usage: bash launch/gpu_pmap.sh [--dry_run] --config FILE [--config.FIELD=VALUE ...]" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ -n ${GPUS:-} ]]; then
  export CUDA_VISIBLE_DEVICES=$GPUS
fi
command=(-m jax_instructblip train "$@" --config.parallel.mode=pmap)
if [[ -n $dry ]]; then
  echo "${GPUS:+CUDA_VISIBLE_DEVICES=$GPUS }${VENV:-.venv}/bin/python ${command[*]@Q}"
  exit
fi
prepare "${EXTRAS-gpu}"
"$python" "${command[@]}"
