#!/usr/bin/env bash
# halfbyte on arm64, emulated: the main job (train, save, resume, generate), then the tests of kernels and quantiser.
#
#     sudo bash tests/arm64.sh [FOLDER ["job kernels quantiser"]]     # 2 GB; hours of one core: LLVM, emulated
#
# Needs root, Debian's mmdebstrap and qemu-user (`qemu-aarch64`), and PYTHON (3.11 to 3.13) with pip. torch is 2.10, the
# last whose wheel on PyPI for this architecture is a build for processors alone. No binfmt: nothing here starts a child.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${1:-/tmp/halfbyte-arm64}
python=${PYTHON:-python3}
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static)

if [ ! -d "$root/opt/site/torch" ]; then
	mmdebstrap --variant=extract --architectures=arm64 --mode=root --include=python3,libgomp1,libstdc++6,libatomic1 \
		trixie "$root"
	for link in bin sbin lib; do [ -e "$root/$link" ] || ln -s "usr/$link" "$root/$link"; done
	wheels=$(mktemp -d)
	platforms=()
	for glibc in 39 38 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
	platforms+=(--platform manylinux2014_aarch64)
	"$python" "$repo/tests/arm64_needs.py" >"$wheels/needs.txt"
	"$python" -m pip download --quiet --only-binary=:all: --no-deps --python-version 3.13 --implementation cp \
		--abi cp313 --abi abi3 --abi none "${platforms[@]}" -d "$wheels" -r "$wheels/needs.txt"
	mkdir -p "$root/opt/site"
	for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$root/opt/site"; done
	rm -r "$wheels"
fi
cp -L "$qemu" "$root/usr/bin/qemu-aarch64"
rm -rf "$root/repo" "$root/tmp/run"
mkdir -p "$root/repo" "$root/proc" "$root/dev" "$root/tmp"
cp -r "$repo/src" "$repo/tests" "$repo/pyproject.toml" "$root/repo/"
trap 'umount "$root/proc" "$root/dev"' EXIT
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"

inside() {
	env -i PATH=/usr/bin:/usr/sbin HOME=/root USER=root OMP_NUM_THREADS=1 HALFBYTE_BNB_KERNEL=0 HALFBYTE_CACHE=/tmp/halfbyte \
		PYTHONPATH=/opt/site:/repo/src:/repo QEMU_CPU=max \
		chroot "$root" /usr/bin/qemu-aarch64 /usr/bin/python3 -c "import os, sys; os.chdir('/repo'); $1"
}

# pytest, without the tests that start a process of their own.
tests() {
	inside "import pytest
kernels = 'tests/layers/kernels/cpu/test_kernels.py'
children = [f'{kernels}::test_a_kernel_from_the_cache_gives_the_bits_of_one_compiled_now',
    f'{kernels}::test_a_kernel_that_the_processor_cannot_run_is_an_error_and_not_the_end_of_the_process',
    'tests/quant/kernels/test_nf4_cpu.py::test_the_loop_is_compiled_once_a_machine']
sys.exit(pytest.main(['-v', '-p', 'no:cacheprovider', '-m', 'not slow', *'$1'.split(),
    *(word for test in children for word in ('--deselect', test))]))"
}

job() {
	inside "import json, pathlib
from halfbyte.system import device
from tests.system.platforms import without
print(device.detect())
print(json.dumps(without.work(pathlib.Path('/tmp/run'))))"
}
kernels() { tests tests/layers/kernels; }
quantiser() { tests tests/quant/kernels; }

for part in ${2:-job kernels quantiser}; do
	"$part"
done
