#!/usr/bin/env bash
# The transformer that comes with the package, over the codes of docs/results/shapes-tokenizer: 11
# minutes of training on two cores of an AMD EPYC with AVX512-BF16 instructions, no GPU. Then
# samples of the two as they come with the package.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_transformer.py --tokenizer runs/shapes-tokenizer/checkpoint.pt --epochs 28 \
    --n-layer 4 --n-head 6 --n-embd 192 --dropout 0 --lr 2e-3 --weight-decay 0.01 \
    --guidance 1 2 3 --out runs/shapes-transformer
vqgan sample shapes --class star heart ring triangle hourglass --guidance 3 --count 8 \
    --out runs/shapes-transformer/samples-guidance3.png
