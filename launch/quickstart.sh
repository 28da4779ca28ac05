#!/usr/bin/env bash
# From a fresh machine to a trained model, its plots and generated text. Every stage is skipped when it is done already.
#
#   bash launch/quickstart.sh [--offline WHEELHOUSE]
#   bash launch/quickstart.sh --make-wheelhouse WHEELHOUSE
#
#   --offline WHEELHOUSE           use no network: install from a folder of wheels
#   --make-wheelhouse WHEELHOUSE   collect those wheels on a machine of the same kind that has a network, and stop
#
# Needs Python 3.11-3.13 with venv, 5 GiB of disk and 6 GiB of memory; no compiler and no GPU (one is used if present).
# PYTHON=/path/to/python names the interpreter. RUN=FOLDER puts everything it makes elsewhere than runs/quickstart.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"

OFFLINE="" WHEELHOUSE=""
while [ $# -gt 0 ]; do
  case "$1" in
    --offline) OFFLINE=$(cd "${2:?--offline needs a folder}" && pwd); shift ;;
    --make-wheelhouse) WHEELHOUSE=${2:?--make-wheelhouse needs a folder}; shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "unknown argument $1; see bash launch/quickstart.sh --help" >&2; exit 2 ;;
  esac
  shift
done

. "$ROOT/launch/install.sh"
if [ -n "$WHEELHOUSE" ]; then
  maha_make_wheelhouse "$WHEELHOUSE"
  exit
fi

RUN=${RUN:-runs/quickstart}
BEGAN=$SECONDS
stage() { printf '\n[%4d s] %s\n' $((SECONDS - BEGAN)) "$*"; }
show_and_run() { printf '$ %s\n' "$*"; "$@"; }

stage "1/6 install"
maha_install ""
export PATH="$VENV/bin:$PATH"

stage "2/6 corpus"
show_and_run python data_prep/make_corpus.py --output "$RUN/corpus.jsonl"

stage "3/6 tokenizer"
show_and_run python data_prep/train_tokenizer.py --input "$RUN/corpus.jsonl" --output "$RUN/tokenizer/tokenizer.model" --vocabulary 4096

stage "4/6 preprocess"
show_and_run python data_prep/preprocess.py --input "$RUN/corpus.jsonl" --output-prefix "$RUN/data/corpus" \
  --tokenizer-model "$RUN/tokenizer/tokenizer.model" --append-eod

stage "5/6 train"
# A finished run is skipped while the data and the configuration are the ones that it was trained on.
trained_on=$(cat configs/run/quickstart.yaml "$RUN/data/corpus_text_document.manifest.json" | cksum)
if [ -e "$RUN/train/summary.json" ] && [ "$(cat "$RUN/train/trained_on" 2>/dev/null)" = "$trained_on" ]; then
  echo "done already: $RUN/train ('rm -r $RUN/train' trains again)"
else
  if [ -e "$RUN/train/trained_on" ] && [ "$(cat "$RUN/train/trained_on")" != "$trained_on" ]; then
    echo "$RUN/train was trained on other data or another configuration; move it away or remove it: rm -r $RUN/train" >&2
    exit 2
  fi
  mkdir -p "$RUN/train" && echo "$trained_on" >"$RUN/train/trained_on"
  where=()
  if [ "$RUN" != runs/quickstart ]; then
    where=(--set "run.folder=$RUN/train" --set "data.train=[{prefix: $RUN/data/corpus_text_document}]"
      --set "data.tokenizer=$RUN/tokenizer/tokenizer.model")
  fi
  show_and_run deepspeed --num_gpus 1 --master_port "$(maha_free_port)" launch/pretrain.py \
    --config configs/run/quickstart.yaml ${where[@]+"${where[@]}"}
fi

stage "6/6 sample"
if [ ! -e "$RUN/sample.txt" ] || [ "$RUN/sample.txt" -ot "$RUN/train/summary.json" ]; then
  show_and_run python tools/generate.py --run "$RUN/train" --prompt "def " --tokens 120 --output "$RUN/sample.txt"
else
  cat "$RUN/sample.txt"
fi

stage "results"
python - "$RUN" <<'PY'
import json, sys
from pathlib import Path

run = Path(sys.argv[1])
summary = json.loads((run / "train" / "summary.json").read_text())
entropy = json.loads((run / "data" / "corpus_text_document.manifest.json").read_text())["unigram_entropy_nats"]
loss = summary["validation_loss_nats"]
print(f"run folder       {run}/train")
print(f"TensorBoard      .venv/bin/tensorboard --logdir {run}/train/tensorboard")
print(f"loss plot        {run}/train/loss.png")
print(f"generated text   {run}/sample.txt")
print(f"validation loss  {loss:.4f} nats a token, {entropy - loss:.2f} nats below the unigram entropy {entropy:.4f}")
print(f"                 {summary['validation_bits_per_byte']:.4f} bits a byte")
PY
