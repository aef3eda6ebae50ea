#!/usr/bin/env bash
# Rebuilds the embedded checkpoints (jax_instructblip/embedded/shapes_llama and shapes_t5) from nothing:
# tokenizers, vision tower, both language models, then the caption phase of the Q-Former.
#
#   bash launch/backbones.sh            less than an hour on two cores
#
#   WORK   folder for the parts (default: runs/backbones); finished parts in it are kept
#   OUT    where the checkpoints go (default: jax_instructblip/embedded; what is there is replaced)
#   SCALE  of all step counts (default: 1; 0.01 only tries the way)
set -euo pipefail
if (($#)); then
  echo "launch/backbones.sh takes no arguments, found $*: set WORK, OUT or SCALE in the environment" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
work=${WORK:-runs/backbones} out=${OUT:-jax_instructblip/embedded} scale=${SCALE:-1}

prepare "${EXTRAS:-}"
"$python" -m jax_instructblip backbones towers "$work" --scale "$scale"
# The T5-like model's queries learn to caption more slowly. The longer they caption, the more of a
# picture they tell whatever is asked: better on pairs never seen, worse at following instructions.
declare -A caption_steps=([llama]=1500 [t5]=5000)
mkdir -p "$out"
for kind in llama t5; do
  steps=$("$python" -c "print(max(25, round(${caption_steps[$kind]} * $scale)))")
  "$python" -m jax_instructblip train --config configs/shapes_captions.py \
    --config.model.checkpoint="$work/base_$kind" --config.workdir="$work/captions_$kind" \
    --config.train.steps="$steps" --config.optimizer.warmup_steps="$((steps / 25))"
  "$python" -m jax_instructblip backbones merge \
    "$work/base_$kind" "$work/captions_$kind" "$out/shapes_$kind"
done
