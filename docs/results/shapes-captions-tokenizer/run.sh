#!/usr/bin/env bash
# A VQGAN of 40,000 drawn shapes, which keeps their shape and colour: 34 minutes with one thread on
# an AMD EPYC with AVX512-BF16 instructions, no GPU, beside other work.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_vqgan.py --data shapes --num-rendered 40000 --epochs 3 --batch-size 32 --lr 2e-3 \
    --perceptual-weight 0.4 --disc-start 0.7 --channels 16 --disc-channels 32 \
    --num-embeddings 1024 --classifier-epochs 2 --eval-classifier-epochs 3 \
    --out runs/shapes-captions-tokenizer
python train_vqgan.py --resume --epochs 7 --out runs/shapes-captions-tokenizer
