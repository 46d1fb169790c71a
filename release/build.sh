#!/usr/bin/env bash
# Build what a release holds into dist/: the source archive, the pure wheel, and with --kernels the wheel with the CPU
# kernels compiled. The environment must hold torch, deepspeed, setuptools and build; PYTHON names its interpreter.
# Equal sources give equal bytes: everything is built twice and compared.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-dist}
# Times in the archives are those of the commit.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for round in 1 2; do
    # From the committed files alone; building leaves files beside the sources.
    mkdir -p "$scratch/src" "$scratch/$round"
    git archive HEAD | tar -x -C "$scratch/src"
    (cd "$scratch/src" && $python -m pip wheel --quiet --no-deps --no-build-isolation -w "$scratch/$round" .)
    (cd "$scratch/src" && $python setup.py --quiet sdist --formats=tar -d "$scratch/$round" 2>/dev/null)
    # setuptools writes the time of day: pack it again, sorted, with the commit's.
    for archive in "$scratch/$round"/*.tar; do
        mkdir "$scratch/sdist" && tar -x -f "$archive" -C "$scratch/sdist"
        tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=go-w \
            -c -C "$scratch/sdist" "$(basename "$archive" .tar)" | gzip -n -9 >"$archive.gz"
        rm -r "$archive" "$scratch/sdist"
    done
    if [ "${1:-}" = --kernels ]; then
        rm -rf "$scratch/src/build"
        (cd "$scratch/src" &&
            PIECE_DS_BUILD_OPS=1 $python -m pip wheel --quiet --no-deps --no-build-isolation -w "$scratch/$round" .)
    fi
    rm -rf "$scratch/src"
done

for file in "$scratch"/1/*; do
    cmp "$file" "$scratch/2/$(basename "$file")" || { echo "error: two builds of it differ" >&2; exit 1; }
done
mkdir -p "$out"
cp "$scratch"/1/* "$out"
(cd "$out" && sha256sum -- *)
