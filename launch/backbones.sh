#!/usr/bin/env bash
# Rebuilds the embedded checkpoints (jax_instructblip/embedded/shapes_llama and shapes_t5) from
# nothing, by BLIP-2's stages: tokenizers and frozen towers; stage 1 on pairs of image and caption;
# stage 2 on captions before each language model, and the text half of the Q-Former of stage 1.
#
#   bash launch/backbones.sh            about an hour and a half on two cores
#
#   WORK   folder for the parts (default: runs/backbones); finished parts in it are kept
#   OUT    where the checkpoints go (default: jax_instructblip/embedded; what is there is replaced)
#   SCALE  of all step counts (default: 1; 0.01 only tries the way)
#   TOWERS=embedded   takes the towers of the embedded checkpoints, which saves half of the time
set -euo pipefail
if (($#)); then
  echo "launch/backbones.sh takes no arguments, found $*: set WORK, OUT, SCALE or TOWERS in the" \
    "environment" >&2
  exit 2
fi
if [[ ${TOWERS:-trained} != trained && $TOWERS != embedded ]]; then
  echo "TOWERS is $TOWERS: expected trained or embedded" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
work=${WORK:-runs/backbones} out=${OUT:-jax_instructblip/embedded} scale=${SCALE:-1}

prepare "${EXTRAS:-}"
backbones() { "$python" -m jax_instructblip backbones "$@"; }
train() { # CONFIG CHECKPOINT RUN [STEPS]: the config's steps, or STEPS, times SCALE
  local steps warmup
  read -r steps warmup < <("$python" -c "
from configs import $1
config = $1.get_config()
steps, warmup = ${4:-config.train.steps}, config.optimizer.warmup_steps
print(max(25, round(steps * $scale)), round(warmup * $scale))")
  "$python" -m jax_instructblip train --config "configs/$1.py" \
    --config.model.checkpoint="$work/$2" --config.workdir="$work/$3" \
    --config.train.steps="$steps" --config.optimizer.warmup_steps="$warmup"
}
have() { [[ -f $work/$1/manifest.json ]]; }

[[ ${TOWERS:-trained} == embedded ]] && towers=(--embedded) || towers=()
backbones towers "$work" --scale "$scale" "${towers[@]}"
# Captions lack the words of questions. Drawn large, their vectors can be told apart afterwards.
have stage1_base || backbones stage1 "$work/base_llama" "$work/stage1_base" --word_std 0.5
train shapes_stage1 stage1_base stage1
# The T5-like model learns more slowly to caption from the queries.
declare -A caption_steps=([llama]=1000 [t5]=2500)
mkdir -p "$out"
for kind in llama t5; do
  have "stage2_base_$kind" ||
    backbones stage2 "$work/stage1" "$work/stage2_base_$kind" --llm "$work/base_$kind"
  train shapes_captions "stage2_base_$kind" "stage2_$kind" "${caption_steps[$kind]}"
  have "instruct_$kind" ||
    backbones instruct "$work/stage2_$kind" "$work/instruct_$kind" --text_from "$work/stage1"
  backbones embed "$work/instruct_$kind" "$out/shapes_$kind"
done
