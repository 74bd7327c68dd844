#!/usr/bin/env bash
# Train the isiZulu model that ships with ulimi, from its corpora to the folder that is released:
#   scripts/isizulu-model.sh CORPORA OUT        (make isizulu-model CORPORA=CORPORA does the same)
#
# CORPORA holds a folder a corpus, as scripts/isizulu-card.md names them, each with train.txt; isizulu_open also with
# valid.txt and test.txt. After an interruption the same command goes on where it stopped.
#
# The settings are in the recipes. More of them, for an experiment, as section.key=value:
#   TEACHER="optim.max_epochs=1" PRETRAIN="optim.max_epochs=1" FINETUNE="optim.max_epochs=1" scripts/isizulu-model.sh CORPORA OUT
set -eo pipefail

MAIN=isizulu_open
# isizulu_open stands in it twice: seven tenths of the text are isiZulu then.
MIX=(isizulu_open nchlt_lower_zul isixhosa_open isizulu_open siswati isindebele)
# A network of twice the size learns from the text first, and what ships from the text and from it.
TEACHER_RECIPE=isizulu-gpu
TEACHER_EPOCHS=30
PRETRAIN_RECIPE=isizulu-pretrain
FINETUNE_RECIPE=isizulu-finetune
CARD=${CARD:-$(dirname "${BASH_SOURCE[0]}")/isizulu-card.md}
THREADS=${THREADS:-0}
read -ra ulimi <<< "${ULIMI:-ulimi}"
read -ra teacher <<< "${TEACHER:-}"
read -ra pretrain <<< "${PRETRAIN:-}"
read -ra finetune <<< "${FINETUNE:-}"

if [ $# -ne 2 ] || [ -z "$1" ] || [ -z "$2" ]; then
  echo "usage: scripts/isizulu-model.sh CORPORA OUT (or: make isizulu-model CORPORA=CORPORA)" >&2
  exit 2
fi
corpora=$1 out=$2
needed=("$MAIN/valid.txt" "$MAIN/test.txt")
for name in "${MIX[@]}"; do needed+=("$name/train.txt"); done
for file in "${needed[@]}"; do
  [ -f "$corpora/$file" ] || { echo "isizulu-model: $corpora/$file is missing" >&2; exit 2; }
done

# The teacher comes first: what was begun without one is another model, of an older ulimi.
if [ -d "$out/pretrain" ] && [ ! -d "$out/teacher" ]; then
  echo "isizulu-model: $out/pretrain was trained without a teacher; give another folder than $out" >&2
  exit 2
fi

stage() { echo "== $*" >&2; }

# Make a folder whole or not at all: NAME.part becomes NAME when it is complete.
finish() { mv "$out/$1.part" "$out/$1"; }

# train RUN CORPUS RECIPE ARGUMENT…: start, go on, or leave alone what is finished.
train() {
  local run=$out/$1 corpus=$out/$2
  local how=(--recipe "${@:3}")
  # The run remembers its settings.
  [ ! -f "$run/last/checkpoint.safetensors" ] || how=(--resume)
  # The model card is the last that a training writes.
  if [ -f "$run/README.md" ]; then
    echo "$run is finished" >&2
  else
    "${ulimi[@]}" train "$corpus" --out "$run" --threads "$THREADS" "${how[@]}"
  fi
}

mkdir -p "$out"

stage "0 of 4: cleaning $MAIN"
if [ ! -d "$out/clean" ]; then
  rm -rf "$out/clean.part"
  "${ulimi[@]}" corpus clean "$corpora/$MAIN" --out "$out/clean.part" --report "$out/clean.part/changes.tsv"
  finish clean
fi

stage "1 of 4: the teacher, on ${MIX[*]}"
if [ ! -d "$out/mix" ]; then
  rm -rf "$out/mix.part"
  mkdir "$out/mix.part"
  for name in "${MIX[@]}"; do
    cat "$corpora/$name/train.txt"
    # The last line of one text must not run into the first of the next.
    [ -z "$(tail -c 1 "$corpora/$name/train.txt")" ] || echo
  done > "$out/mix.part/train.txt"
  cp "$corpora/$MAIN/valid.txt" "$corpora/$MAIN/test.txt" "$out/mix.part/"
  finish mix
fi
train teacher mix "$TEACHER_RECIPE" "optim.max_epochs=$TEACHER_EPOCHS" "${teacher[@]}"

stage "2 of 4: pretraining on the same text"
train pretrain mix "$PRETRAIN_RECIPE" --teacher "$out/teacher" "${pretrain[@]}"

stage "3 of 4: finetuning on the cleaned text"
train finetune clean "$FINETUNE_RECIPE" --init-from "$out/pretrain" --teacher "$out/teacher" "${finetune[@]}"

stage "4 of 4: the folder that is released"
[ -d "$out/isizulu" ] || "${ulimi[@]}" release "$out/finetune" --out "$out/isizulu" --card "$CARD"
echo "the model is in $out/isizulu; try: ulimi generate \"Namhlanje\" -m $out/isizulu"
