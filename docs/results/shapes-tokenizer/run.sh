#!/usr/bin/env bash
# The tokenizer that comes with the package: 5 minutes of training, and some of classifiers, on two
# cores of an AMD EPYC with AVX512-BF16 instructions, no GPU.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_vqgan.py --data shapes --epochs 3 --batch-size 32 --lr 2e-3 \
    --perceptual-weight 0.2 --disc-start 0.5 --channels 16 --disc-channels 32 \
    --num-embeddings 256 --eval-classifier-epochs 12 --out runs/shapes-tokenizer
python train_vqgan.py --resume --epochs 8 --out runs/shapes-tokenizer
