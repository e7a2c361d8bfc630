#!/usr/bin/env bash
# The rows of the table, 6 epochs each, the codebooks of other sizes, 2 epochs, and transformers over
# the tokens of two rows. With one thread on an AMD EPYC with AVX512-BF16 instructions, no GPU:
# about 8 minutes per row on an idle core, 3 per size, and 10 per transformer. DATA is the data of
# all these runs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
train="python train_vqvae.py $data --precision bf16 --models vqvae"
row() { $train --epochs 6 --out "runs/codebooks/$1" "${@:2}"; }
row ema
row gradient --quantizer gradient
row ema-cosine --cosine --embedding-dim 16
row gradient-cosine --quantizer gradient --cosine --embedding-dim 16
row ema-rotation --gradient-estimator rotation
row simvq --quantizer simvq
row simvq-8 --quantizer simvq --embedding-dim 8
row fsq --quantizer fsq
row lfq --quantizer lfq
row residual-3x8 --quantizer residual --num-rounds 3 --num-embeddings 8
row ema-unguarded --no-data-init --no-restart-dead-codes
row gradient-unguarded --quantizer gradient --no-data-init

for K in 64 512 4096; do
    for quantizer in ema fsq "simvq --embedding-dim 8" lfq; do
        $train --epochs 2 --quantizer $quantizer --num-embeddings $K \
            --out runs/codebooks-sweep/${quantizer%% *}-$K
    done
done

for name in ema fsq; do
    python train_transformer.py --tokenizer runs/codebooks/$name/checkpoint.pt \
        --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --epochs 2 --precision bf16 \
        --num-samples 2000 --eval-classifier-epochs 1 --out runs/codebooks/prior-$name
done
python docs/experiments/codebooks.py $data
