#!/usr/bin/env bash
# Makes gpu-kit/, what travels to a machine with a GPU and no network (Python 3.12, torch 2.11) beside the tree, checks it here without a
# network, and prints the commands to run there. PYTHON: an interpreter that has rmprune's requirements (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
kit=gpu-kit limit_mib=64
# What such a machine lacks, and what that needs; torch, torchvision, timm, numpy, pandas, matplotlib, onnx, safetensors and filelock are there.
lacking="torch-pruning tyro dacite tomli-w rich docstring-parser typeguard markdown-it-py mdurl pygments"
images=/usr/share/datasets/fashion-mnist

mkdir -p $kit/wheels $kit/fashion-mnist
rm -f $kit/wheels/*
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 312 --implementation py --abi none --platform any \
    -d $kit/wheels $lacking
test -z "$(find $kit/wheels -name '*.whl' ! -name '*-none-any.whl')" || { echo "a wheel is not pure"; exit 1; }
test -d $images || { apt-get update -q && apt-get install -qy dataset-fashion-mnist; }
cp $images/*.gz $kit/fashion-mnist/

echo "describing the networks that speed measures"
PYTHONPATH=. "$python" -W ignore experiments/gpu.py --write-networks --networks $kit/networks

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "checking: the tree as it travels, the wheels without an index, every other package from $python"
mkdir "$work/tree" "$work/others"
git ls-files -coz --exclude-standard | xargs -0 cp --parents -t "$work/tree"
cp -r $kit "$work/tree/"
"$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" $kit/wheels/*.whl
for entry in "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/*; do
    name=$(basename "$entry")
    case $name in *rmprune* | *.pth) ;; *) test -e "$work/site/$name" || ln -s "$entry" "$work/others/$name" ;; esac
done
(cd "$work/tree" && PYTHONPATH=.:$work/site:$work/others "$python" -S -W ignore experiments/gpu.py --quick --out "$work/out" &&
    PYTHONPATH=.:$work/site:$work/others "$python" -S -W ignore -c "
from pathlib import Path
from rmprune.config import DataConfig
from rmprune.data.load import load_dataset
assert len(load_dataset(DataConfig('fashion-mnist', Path('$kit/fashion-mnist'))).test) == 10000
assert __import__('tyro').__file__.startswith('$work/site') and __import__('rmprune').__file__.startswith('$work/tree')")
"$python" -c "
import json, pathlib
run = json.loads(next(pathlib.Path('$work/out').glob('run-*.json')).read_text())
assert run['left_out'] == [], run['left_out']"

mib=$(du -sk --apparent-size "$work/tree" | awk '{ print int($1 / 1024) + 1 }')
echo "tree and kit: $mib MiB of $limit_mib ($(du -sk --apparent-size $kit | cut -f1) KiB are the kit's)"
test "$mib" -le $limit_mib || { echo "too large to travel"; exit 1; }

install="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $kit/wheels/*.whl"
measure="export PYTHONPATH=.:/tmp/site PYTHONUNBUFFERED=1; set -o pipefail; python3 experiments/gpu.py --data-dir $kit/fashion-mnist --networks $kit/networks --out \$OUT"
cat <<END

On the machine, with carry ["$kit"] (a command ends within its own seconds; what is under \$OUT comes back, seven files):
1. timeout_s 330: $install && $measure --parts exactness,speed 2>&1 | tee \$OUT/log.txt
2. timeout_s 330: $install && $measure --parts additions,training,accuracy 2>&1 | tee \$OUT/log.txt
Where time is left: $measure --parts accuracy --seed 3 --seeds 2, and python3 -m pytest -m cuda -n 0 -p no:cacheprovider tests/training tests/measure
Then here, with the CSV and JSON of each command in a folder of its own under reports/gpu: $python experiments/gpu.py --figures reports/gpu
END
