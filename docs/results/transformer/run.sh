#!/usr/bin/env bash
# A class-conditional transformer over the codes of docs/results/vqgan, 10,000 samples at six
# settings, and a picture of some. 82 minutes of training on two cores of an AMD EPYC with
# AVX512-BF16 instructions, no GPU, paused at times for other work.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python train_transformer.py --tokenizer runs/vqgan/checkpoint.pt --epochs 8 --dropout 0 \
    --out runs/transformer
python train_transformer.py --resume --guidance 1 2 3 --top-k 1024 100 --out runs/transformer
vqgan sample runs/transformer/checkpoint.pt --guidance 2 --count 7 \
    --out runs/transformer/samples-guidance2.png
