#!/usr/bin/env bash
# The last of the three scripts of the whole path, over the codes of docs/results/path-vqgan: 4 min
# 23 s in all on two cores of an AMD EPYC with AVX512-BF16 instructions, no GPU, hardly anything
# beside it.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_transformer.py --tokenizer runs/path-vqgan/checkpoint.pt --num-rendered 32000 \
    --no-flip --epochs 7 --n-layer 3 --n-head 2 --n-embd 128 --dropout 0 --lr 3e-3 \
    --weight-decay 0.01 --guidance 3 --temperature 0.8 --num-samples 500 \
    --out runs/path-transformer
