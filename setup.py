"""Installs sae.py and sae_weights.py and builds the extension sae_csrc.so beside it:

    pip install --no-build-isolation -e .

Build isolation would download a second torch, and the extension must be built against the one that is used.
Without a C++20 compiler the reference PyTorch ops serve; without an nvcc of torch's CUDA major version the
extension has its CPU part only. Both say so. `TORCH_CUDA_ARCH_LIST` chooses the GPU architectures (default
8.0;9.0+PTX: Ampere, Ada, Hopper, and newer ones from PTX).
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
CXX = os.environ.get("CXX", "c++")
# The extension keeps to libtorch's stable ABI of this version, so newer ones load the same binary.
TARGET = "0x020b000000000000"                                 # 2.11


def say(message):
    print(f"setup.py: {message}", file=sys.stderr)


def source_crc(folder):
    """One number for all sources; sae.py computes the same one to notice a stale binary."""
    crc = 0
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):      # not what editors leave there
            crc = zlib.crc32(path.name.encode() + b"\0" + path.read_bytes(), crc)
    return crc


def why_no_compiler():
    """None where CXX compiles C++20, else why not."""
    if not shutil.which(CXX.split()[0]):
        return "no C++ compiler"
    # <bit> is C++20's; compilers that only know its draft refuse the flag or lack the header.
    program = "#include <bit>\nstatic_assert(std::has_single_bit(4u));\n"
    command = [*CXX.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=program, capture_output=True, text=True).returncode:
        return f"{CXX} does not compile C++20"
    return None


def old_gpu():
    """The name of a GPU here that is older than the kernels' instructions, of Ampere; None without one."""
    import torch
    for i in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(i) < (8, 0):
            return torch.cuda.get_device_name(i)
    return None


def find_nvcc(cuda):
    """(path, None) of an nvcc of torch's CUDA major version, which launches need, or (None, why not)."""
    if cuda is None:
        return None, "this torch is a CPU build"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None, f"no nvcc in {home}/bin" if home else "no nvcc on PATH"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.", version)[1]
    if found != cuda.split(".")[0]:
        return None, f"{nvcc} is of CUDA {found} and torch of CUDA {cuda}"
    return nvcc, None


def gencode(archs):
    """'8.0;9.0+PTX' -> nvcc flags. Architectures before 8.0, which containers name, are left out."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        m = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", arch)
        if not m:
            raise SystemExit(f"setup.py: TORCH_CUDA_ARCH_LIST has {arch!r}; give numbers such as 8.0;9.0+PTX")
        if int(m[1]) < 8:
            say(f"no kernels for architecture {arch} of TORCH_CUDA_ARCH_LIST: they need 8.0 or newer")
            continue
        n = m[1] + m[2]
        flags.append(f"-gencode=arch=compute_{n},code=sm_{n}")
        if m[3]:
            flags.append(f"-gencode=arch=compute_{n},code=compute_{n}")
    return " ".join(flags)


def quote(path):
    """For a ninja file."""
    return re.sub(r"([$: ])", r"$\1", str(path))


def ninja_rules(folder, torch_home, nvcc):
    archs = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX")
    warnings = "-Wall -Wno-maybe-uninitialized -Wno-psabi -Wno-ignored-attributes"
    defines = f"-DTORCH_TARGET_VERSION={TARGET}" + " -DSAE_CUDA -DUSE_CUDA" * bool(nvcc)
    # CUDA's runtime comes with libtorch_cuda: linking our own could bring a second one.
    libraries = f'-L"{torch_home}/lib" -ltorch_cpu -lc10' + " -ltorch_cuda" * bool(nvcc)
    return f"""
builddir = {quote(folder)}
# ninja quotes $in and $out itself, where a name needs it.
rule cpp
  command = {CXX} -MMD -MF $out.d -std=c++20 -O3 -fno-math-errno -fPIC {warnings} {defines} $
      -isystem "{torch_home}/include" -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule cu
  command = "{nvcc}" -MMD -MF $out.d -std=c++17 -O3 -lineinfo -Xcompiler -fPIC {archs} -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {CXX} -shared $in {libraries} -o $out.tmp && mv $out.tmp $out
  description = $out
"""


class Build(build_ext):
    """Ninja, with torch's include and library folders and nothing else of torch's build system."""

    def get_ext_filename(self, name):
        return name + ".so"                                   # no Python ABI in it: it is not a Python module

    def build_extension(self, ext):
        try:
            import ninja
            import torch
        except ModuleNotFoundError as error:
            raise SystemExit(f"setup.py: no {error.name} to build with: install torch and ninja, then this "
                             "package by `pip install --no-build-isolation -e .`: so the build sees them")
        nvcc, why_not = find_nvcc(torch.version.cuda)
        if nvcc and old_gpu():
            nvcc, why_not = None, f"the kernels need Ampere or newer, which this {old_gpu()} is not"
        if why_not:
            say(f"building sae_csrc for the CPU only: {why_not}")

        folder = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        crc = folder / "crc.cpp"
        text = ("#include <cstdint>\nnamespace sae { extern const int64_t kSourceCrc; "
                f"const int64_t kSourceCrc = {source_crc(ROOT / 'csrc')}; }}\n")
        if not crc.exists() or crc.read_text() != text:
            crc.write_text(text)

        sources = [*sorted((ROOT / "csrc").glob("*.cpp")), crc]
        if nvcc:
            sources += sorted((ROOT / "csrc").glob("*.cu"))
        objects = [folder / (p.name + ".o") for p in sources]
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        builds = [f"build {quote(o)}: {p.suffix[1:]} {quote(p)}" for o, p in zip(objects, sources)]
        builds.append(f"build {quote(out)}: link {' '.join(map(quote, objects))}")
        rules = ninja_rules(folder, Path(torch.__file__).parent, nvcc)
        (folder / "build.ninja").write_text(rules + "\n".join(builds) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, *jobs], check=True)


def extensions():
    why_not = f"no extension on {sys.platform}" if sys.platform != "linux" else why_no_compiler()
    if why_not:
        say(f"{why_not}: the reference ops serve")
    return [] if why_not else [Extension("sae_csrc", [])]


readme = ROOT / "README.md"
setup(
    name="sae",
    version="0.1.0",
    description="S-AE, the Semantic Auto-encoder: one latent space for understanding and generation",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["sae", "sae_weights"],
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    install_requires=["torch>=2.11", "numpy>=1.26", "pillow>=10.1", "lpips>=0.1.4", "scipy>=1.11",
                      "ninja>=1.11", "pybind11>=2.12"],
    extras_require={
        # Tests call functions that transformers keeps to itself: not another major version.
        "test": ["pytest>=8", "transformers>=4.56,<6", "timm>=1.0.20", "torch-fidelity>=0.3",
                 "torchmetrics>=1.4", "safetensors>=0.8", "hypothesis>=6", "scikit-learn>=1.4",
                 "diffusers>=0.37", "matplotlib>=3.8"],
        # The first diffusers with AutoencoderRAE.
        "plots": ["matplotlib>=3.8"],
        "peers": ["diffusers>=0.37", "transformers>=4.56", "timm>=1.0.20"],
    },
)
