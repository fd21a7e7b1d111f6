"""Installs sae.py and builds the extension sae_csrc.so beside it:

    pip install --no-build-isolation -e .

Build isolation would download a second torch, and the extension must be built against the one that is used. Without a C++ compiler
the reference PyTorch ops serve; without an nvcc of torch's CUDA major version the extension has its CPU part only. Both say so.
`TORCH_CUDA_ARCH_LIST` chooses the GPU architectures (default 8.0;9.0+PTX: Ampere, Ada, Hopper, and newer ones from PTX).
"""
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The C++ interface of the extension stays within libtorch's stable ABI of this version, so newer ones load the same binary.
TARGET = "0x020b000000000000"                                                   # 2.11


def source_crc(folder):
    """One number for all sources; sae.py computes the same one to notice a stale binary."""
    crc = 0
    for path in sorted(folder.iterdir()):
        crc = zlib.crc32(path.name.encode() + b"\0" + path.read_bytes(), crc)
    return crc


def find_nvcc(cuda):
    """(path, None), or (None, why not), of an nvcc of the same major version as torch's CUDA, which launches are tied to."""
    if cuda is None:
        return None, "this torch is a CPU build"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None, f"no nvcc in {home}/bin" if home else "no nvcc on PATH"
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)
    if found[1] != cuda.split(".")[0]:
        return None, f"{nvcc} is of CUDA {found[1]} and torch of CUDA {cuda}"
    return nvcc, None


def gencode(archs):
    """'8.0;9.0+PTX' -> nvcc flags."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        if not (m := re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", arch)):
            raise SystemExit(f"setup.py: TORCH_CUDA_ARCH_LIST has {arch!r}; give numbers such as 8.0;9.0+PTX")
        n = m[1] + m[2]
        flags += [f"-gencode=arch=compute_{n},code=sm_{n}"] + [f"-gencode=arch=compute_{n},code=compute_{n}"] * bool(m[3])
    return " ".join(flags)


class Build(build_ext):
    """Ninja, with torch's include and library folders and nothing else of torch's build system."""

    def get_ext_filename(self, name):
        return name + ".so"                                                     # no Python ABI in it: it is not a Python module

    def build_extension(self, ext):
        import ninja
        import torch
        lib, include = Path(torch.__file__).parent / "lib", Path(torch.__file__).parent / "include"
        nvcc, why_not = find_nvcc(torch.version.cuda)
        if why_not:
            print(f"setup.py: building sae_csrc for the CPU only: {why_not}", file=sys.stderr)
        folder = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        crc = f'#include <cstdint>\nnamespace sae {{ extern const int64_t kSourceCrc; const int64_t kSourceCrc = {source_crc(ROOT / "csrc")}; }}\n'
        if not (folder / "crc.cpp").exists() or (folder / "crc.cpp").read_text() != crc:
            (folder / "crc.cpp").write_text(crc)
        sources = [p for p in sorted((ROOT / "csrc").iterdir()) if p.suffix == ".cpp" and p.name != "emulate.cpp"] + [folder / "crc.cpp"]
        sources += sorted((ROOT / "csrc").glob("*.cu")) if nvcc else []
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # CUDA's runtime comes with libtorch_cuda: linking our own could bring a second one.
        libs = "-ltorch_cpu -lc10" + " -ltorch_cuda" * bool(nvcc)

        def quote(path):
            return re.sub(r"([$: ])", r"$\1", str(path))

        cxx = os.environ.get("CXX", "c++")
        rules = f'''
builddir = {quote(folder)}
rule cpp
  command = {cxx} -MMD -MF $out.d -std=c++20 -O3 -fno-math-errno -fPIC -Wall -Wno-maybe-uninitialized -Wno-psabi -Wno-ignored-attributes $
      -DTORCH_TARGET_VERSION={TARGET} {'-DSAE_CUDA -DUSE_CUDA' if nvcc else ''} -isystem "{include}" -c "$in" -o "$out"
  depfile = $out.d
  deps = gcc
  description = $in
rule cu
  command = "{nvcc}" -MMD -MF $out.d -std=c++17 -O3 -lineinfo -Xcompiler -fPIC {gencode(os.environ.get('TORCH_CUDA_ARCH_LIST', '8.0;9.0+PTX'))} -c "$in" -o "$out"
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {cxx} -shared $in -L"{lib}" {libs} -o "$out.tmp" && mv "$out.tmp" "$out"
  description = $out
'''
        objects = [folder / (p.name + ".o") for p in sources]
        builds = [f"build {quote(o)}: {p.suffix[1:]} {quote(p)}" for o, p in zip(objects, sources)]
        builds.append(f'build {quote(out)}: link {" ".join(map(quote, objects))}')
        (folder / "build.ninja").write_text(rules + "\n".join(builds) + "\n")
        out.parent.mkdir(parents=True, exist_ok=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, *jobs], check=True)


def extensions():
    if sys.platform != "linux":
        print(f"setup.py: no extension on {sys.platform}: the reference ops serve", file=sys.stderr)
    elif not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        print("setup.py: no C++ compiler: the reference ops serve", file=sys.stderr)
    else:
        return [Extension("sae_csrc", [])]
    return []


setup(
    name="sae",
    version="0.1.0",
    description="S-AE, the Semantic Auto-encoder: one latent space for understanding and generation",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["sae"],
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    install_requires=["torch>=2.11", "numpy>=1.26", "pillow>=10", "lpips>=0.1.4", "scipy>=1.11", "ninja>=1.11", "pybind11>=2.12"],
    extras_require={
        "test": ["pytest>=8", "transformers>=4.56", "timm>=1.0.20", "torch-fidelity>=0.3", "torchmetrics>=1.4", "safetensors>=0.8",
                 "hypothesis>=6", "scikit-learn>=1.4", "matplotlib>=3.8", "tensorboard>=2.16", "diffusers>=0.37"],
        "plot": ["matplotlib>=3.8", "tensorboard>=2.16"],
        "peers": ["diffusers>=0.37", "transformers>=4.56"],                      # the first with AutoencoderRAE
    },
)
