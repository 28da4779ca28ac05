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
if [ -e "$RUN/train/summary.json" ]; then
  echo "already trained; remove $RUN/train to train again"
else
  show_and_run deepspeed --num_gpus 1 --master_port "$(maha_free_port)" launch/pretrain.py --config configs/run/quickstart.yaml
fi

stage "6/6 sample"
if [ ! -e "$RUN/sample.txt" ]; then
  show_and_run python tools/generate.py --run "$RUN/train" --prompt "def " --tokens 120 --output "$RUN/sample.txt"
fi
