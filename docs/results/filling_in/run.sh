#!/usr/bin/env bash
# A GPT and masked transformers over the same tokens: of drawn shapes, by the tokenizer that comes
# with the package, and of CIFAR-10, by the EMA row of codebooks/ (its run.sh comes first, and its
# evaluation classifier is used). On an NVIDIA H200, beside twelve other trainings, 20 epochs on
# shapes took 3 minutes, and 10 on CIFAR-10 took 4. shapes-masked-long ran there to step 12,000 of
# 24,960, and then for 53 minutes with one thread on an AMD EPYC with AVX512-BF16 instructions; its
# samples are those of the flags below, and its `command` names those that it began with.
# DATA is the data of the runs on CIFAR-10.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data=${DATA:-"--data cifar10"}
shared="--n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --precision bf16 --checkpoint-every 2000"
shared="$shared --num-samples 1000 --guidance 1 2 3"
masked="--prior masked --steps 4 8 12 16 64"

train="python train_transformer.py --tokenizer vqgan/pretrained/shapes/tokenizer.pt $shared"
train="$train --data shapes --num-rendered 20000"
$train --epochs 20 --out runs/filling_in/shapes-gpt
train="$train --eval-classifier runs/filling_in/shapes-gpt/eval_classifier.pt"
$train --epochs 20 $masked --out runs/filling_in/shapes-masked
$train --epochs 20 $masked --mask-schedule uniform --out runs/filling_in/shapes-masked-uniform
$train --epochs 80 --prior masked --steps 1 2 4 8 12 16 64 --guidance 3 \
    --out runs/filling_in/shapes-masked-long

# The loss on all tokens, also on those that are not masked, which no flag gives.
python - $train --epochs 20 $masked --out runs/filling_in/shapes-masked-all <<'EDIT'
import math
import runpy
import sys

import torch
import torch.nn.functional as F

from vqgan.masked import MaskedTransformer, random_masks


def loss(self, condition, tokens):
    numbers = self._uniform_numbers(tokens)
    fraction = torch.cos(math.pi / 2 * numbers[:, 0])
    mask = random_masks(numbers[:, 1:], (self.seq_len * fraction).ceil())
    logits = self(condition, tokens.masked_fill(mask, self.mask_token)).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens)


MaskedTransformer.loss = loss
sys.argv = sys.argv[2:]  # the script, and its flags
runpy.run_path(sys.argv[0], run_name="__main__")
EDIT

train="python train_transformer.py --tokenizer runs/codebooks/ema/checkpoint.pt $data $shared"
train="$train --eval-classifier runs/codebooks/eval_classifier.pt --epochs 10"
$train --out runs/filling_in/cifar10-gpt
$train $masked --out runs/filling_in/cifar10-masked
python docs/experiments/filling_in.py $data
