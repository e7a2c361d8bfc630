#!/usr/bin/env bash
# The same transformer over the codes of the VQ-VAE of docs/results/study, measured by the classifier
# of docs/results/vqgan: 68 minutes of training with one thread on an AMD EPYC with AVX512-BF16
# instructions, no GPU, beside other work. DATA is the data of these two runs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
python train_transformer.py --tokenizer runs/study/vqvae/checkpoint.pt \
    --eval-classifier runs/vqgan/eval_classifier.pt $data --image-size 32 --epochs 5 \
    --dropout 0 --guidance 1 2 3 --out runs/transformer-vqvae
