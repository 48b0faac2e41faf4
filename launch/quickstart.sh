#!/usr/bin/env bash
# From a fresh clone to a picture: virtual environment, install, data, train, sample. No GPU needed.
# Run again, it goes on where it stopped; LUMINA_VENV and PYTHON choose another environment or interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh
install_lumina -e .

if [ ! -d data/digits ]; then
    lumina data digits data/digits
fi
lumina train configs/digits.yaml

out=runs/digits/samples
rm -rf "$out"
lumina sample runs/digits --out "$out" --count 8 --height 8 --width 8 --steps 20 --guidance 2.5 --prompt \
    "please write the digit zero for me" "draw me the numeral 1" "a handwritten digit two" \
    "what does a handwritten 3 look like?" "a photograph of the number four on a sheet of paper" \
    "draw me the numeral 5" "please write the digit six for me" "a handwritten digit seven" \
    "a photograph of the number eight on a sheet of paper" "the number 9 written by hand"

echo
echo "The digits your model drew, a row for each prompt: $PWD/$out/sheet.png"
echo "How it learned them:                               $PWD/runs/digits/previews/"
