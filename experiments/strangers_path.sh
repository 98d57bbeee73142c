#!/usr/bin/env bash
# A stranger's path by README alone, in a fresh clone and a fresh environment: from pip install to the report's page and a prediction of deploy/.
#
#     bash experiments/strangers_path.sh [COMMIT]
#
# Runs the README's first command (which installs, trains, removes, prunes, measures), looks at the page, and asks the deployed network about a digit.
# Prints the commands that a stranger types, and the seconds each took. The clone is of this repository; what pip fetches comes from where pip is told.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd) away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
count=0 total=0
typed() { # a command, in the clone
    local began=$SECONDS
    bash -euo pipefail -c "$1" >"$away/said" 2>&1 || { cat "$away/said"; exit 1; }
    count=$((count + 1)) total=$((total + SECONDS - began))
    printf '%5d s  %s\n' $((SECONDS - began)) "$1"
}
printf 'load before: %s, cores: %s\n' "$(cut -d' ' -f1-3 /proc/loadavg)" "$(nproc)"
typed "git clone --quiet $here $away/rmprune && git -C $away/rmprune checkout --quiet ${1:-HEAD}"
cd "$away/rmprune"
main_job=$(awk '/^```/ { inside = !inside; next } inside && /^python3 -m venv .*rmprune slim/ { print; exit }' README.md)
test -n "$main_job"
typed "$main_job"
cp "$away/said" "$away/main"
page=$(ls runs/*/report/index.html)
test "$(wc -c <"$page")" -gt 100000
# Beside what a stranger types: an image to ask about, a digit as scikit-learn has it.
.venv/bin/python -c "
from PIL import Image
from sklearn.datasets import load_digits
Image.fromarray((load_digits().images[7] * 255 / 16).astype('uint8')).save('seven.png')"
ask=$(sed -n 's/^next: *\(python .*\)IMAGE$/\1/p' "$away/main" | head -1)
typed ".venv/bin/$ask seven.png"
cat "$away/said"
grep -q '^seven.png: 7 ' "$away/said"
printf '%d commands, %d s; the page: %s (%d bytes)\nload after: %s\n' "$count" "$total" "$page" "$(wc -c <"$page")" "$(cut -d' ' -f1-3 /proc/loadavg)"
