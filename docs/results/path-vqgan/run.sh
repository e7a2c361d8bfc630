#!/usr/bin/env bash
# The second of the three scripts of the whole path, on drawn shapes: 5 min 2 s in all on two cores
# of an AMD EPYC with AVX512-BF16 instructions, no GPU, hardly anything beside it.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_vqgan.py --data shapes --num-rendered 32000 --epochs 2 --batch-size 32 --lr 2e-3 \
    --perceptual-weight 1 --disc-start 0.85 --channels 16 --disc-channels 32 \
    --num-embeddings 512 --classifier-epochs 3 --eval-classifier-epochs 2 --out runs/path-vqgan
