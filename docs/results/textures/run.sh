#!/usr/bin/env bash
# A transformer over the codes of docs/results/textures-tokenizer, 4 minutes of training with one
# thread on an AMD EPYC with AVX512-BF16 instructions, no GPU; and pictures larger than those it was
# trained on, by it and by the transformer that comes with the package.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_transformer.py --tokenizer runs/textures-tokenizer/checkpoint.pt --epochs 8 \
    --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --lr 2e-3 --out runs/textures
vqgan sample runs/textures/checkpoint.pt --class stripes checks --count 3 \
    --height 96 --width 96 --guidance 2 --out runs/textures/large.png
vqgan sample shapes --class star heart circle --count 4 --height 64 --width 64 --guidance 3 \
    --out runs/textures/shapes-large.png
