#!/usr/bin/env bash
# A transformer that takes captions, over the codes of docs/results/shapes-captions-tokenizer, and
# 500 captions asked for at six settings: 159 minutes with one thread on an AMD EPYC with
# AVX512-BF16 instructions, no GPU, beside other work. In four stages, at each of which the learning
# rate begins anew; --epochs 32 at once should do as well, and was not tried.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_transformer.py --tokenizer runs/shapes-captions-tokenizer/checkpoint.pt \
    --num-rendered 40000 --condition caption --epochs 10 --n-layer 4 --n-head 6 --n-embd 192 \
    --dropout 0 --lr 2e-3 --weight-decay 0.01 --num-samples 500 --guidance 1 2 3 \
    --out runs/captions
python train_transformer.py --resume --epochs 17 --guidance 1 3 4 --temperature 1 0.8 \
    --out runs/captions
python train_transformer.py --resume --epochs 24 --guidance 1 3 4 --temperature 1 0.8 \
    --out runs/captions
python train_transformer.py --resume --epochs 32 --guidance 1 3 4 --temperature 1 0.8 \
    --out runs/captions
vqgan sample runs/captions/checkpoint.pt --guidance 3 --count 8 \
    --caption "small red star on blue" "large yellow heart on purple" \
    "medium white ring on black" "large green crescent on orange" \
    "medium blue cross on yellow" "large purple hourglass on white" \
    --out runs/captions/samples-guidance3.png
