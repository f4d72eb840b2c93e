#!/usr/bin/env bash
# From a fresh clone to a trained VQ-VAE, its numbers and its pictures. Run it again to continue where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/quickstart
begun=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - begun)); }

say "1/4 install"
source launch/setup.sh demo

say "2/4 demo photographs -> shards"
if [ -f data/photos/train/index.json ] && [ -f data/photos/val/index.json ]; then
    echo "   data/photos exists"
else
    python launch/shards.py demo data/photos
fi

say "3/4 train: deepspeed launch/train.py --config configs/quickstart.yaml"
deepspeed launch/train.py --config configs/quickstart.yaml

say "4/4 evaluate"
python launch/evaluate.py --run $run

say "done"
echo "see the curves and pictures:  $PWD/.venv/bin/tensorboard --logdir $PWD/$run/tensorboard"
