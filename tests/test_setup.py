"""The set-up: what make and .ci/run would do, without doing it, and what the files may import."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RUN_TIME = {"torch", "numpy", "PIL", "scipy", "lpips", "torchvision", "tqdm"}  # lpips brings the last two

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path):
    """A clone with the Makefile, an empty setup.py and one kernel, older than any stamp."""
    clone = tmp_path / "clone"
    (clone / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", clone)
    for name in "setup.py", "csrc/kernel.cu":
        (clone / name).touch()
        os.utime(clone / name, (1, 1))
    return clone


def environment(**env):
    """Without a compiler's name, and what a `make test` around this one has set."""
    unset = "MAKE", "MFLAGS", "SAE_TEST_DATA", "CXX"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    return inherited | env


def make(tree, *args):
    return subprocess.run(["make", *args], cwd=tree, env=environment(), capture_output=True, text=True)


def stamps(tree, *names):
    (tree / ".venv").mkdir(exist_ok=True)
    for i, name in enumerate(names):
        (tree / ".venv" / f"{name}.stamp").touch()
        os.utime(tree / ".venv" / f"{name}.stamp", (10 + i, 10 + i))


@needs_make
def test_the_demo_installs_no_test_oracles_and_the_tests_do(tree):
    demo, test = make(tree, "-n", "demo").stdout, make(tree, "-n", "test").stdout
    assert "[test]" not in demo and "-e ." in demo and demo.rstrip().endswith("tests/miniature.py")
    assert "-e '.[test]'" in test and "-m pytest" in test


@needs_make
def test_torch_is_installed_before_the_package_that_is_built_against_it(tree):
    lines = make(tree, "-n", "setup").stdout.splitlines()
    torch, package = [next(i for i, line in enumerate(lines) if word in line)
                      for word in ("'torch>=2.11'", "-e .")]
    assert torch < package and "--no-build-isolation" in lines[package]


@needs_make
@pytest.mark.parametrize("goal, done", [("setup", ["torch", "setup"]),
                                        (".venv/test.stamp", ["torch", "test"])])
def test_a_second_run_installs_nothing_until_a_source_changes(tree, goal, done):
    assert make(tree, "-q", goal).returncode == 1
    stamps(tree, *done)
    assert make(tree, "-q", goal).returncode == 0
    for source in "csrc/kernel.cu", "setup.py":
        os.utime(tree / source, (99, 99))
        assert make(tree, "-q", goal).returncode == 1
        os.utime(tree / source, (1, 1))


@needs_make
@pytest.mark.parametrize("version, refused", [((2, 7, 18), True), ((3, 9, 18), True), ((3, 10, 0), False),
                                              ((3, 14, 0), False), ((3, 20, 0), False)])
def test_a_python_before_3_10_is_refused_before_anything_is_made(tree, version, refused):
    fake = tree / "python"
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    fake.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{pretend}' \"$@\"\n")
    fake.chmod(0o755)
    run = make(tree, "setup", f"PYTHON={fake}")              # of an interpreter that is taken the venv fails
    assert run.returncode
    assert (f"is Python {version[0]}.{version[1]}; S-AE needs 3.10 or newer" in run.stderr) == refused
    assert not (tree / ".venv").exists()


def setup_py(tmp_path, *command, **env):
    command = command or ("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment(**env),
                          capture_output=True, text=True)


def test_setup_says_when_there_is_no_compiler(tmp_path):
    run = setup_py(tmp_path, "--name", PATH=str(tmp_path))
    assert run.returncode == 0 and "no C++ compiler: the reference ops serve" in run.stderr


def test_a_compiler_without_cpp20_is_no_reason_to_fail(tmp_path):
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\ncase \"$*\" in *-std=c++20*) echo \"unknown option\" >&2; exit 1;; esac\n")
    old.chmod(0o755)
    run = setup_py(tmp_path, CXX=str(old))
    assert run.returncode == 0, run.stderr
    assert run.stderr == f"setup.py: {old} does not compile C++20: the reference ops serve\n"
    assert not (tmp_path / "lib").exists()


@needs_compiler
@pytest.mark.parametrize("missing", ["ninja", "torch"])
def test_under_build_isolation_one_sentence_gives_the_right_command(tmp_path, missing):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('none here', name='{missing}')")
    run = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert run.returncode and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"setup.py: no {missing} to build with: ")
    assert "`pip install --no-build-isolation -e .`" in run.stderr


@needs_compiler
def test_an_unknown_architecture_is_refused(tmp_path):
    run = setup_py(tmp_path, TORCH_CUDA_ARCH_LIST="Hopper")
    assert run.returncode
    assert "setup.py: TORCH_CUDA_ARCH_LIST has 'Hopper'; give numbers such as 8.0;9.0+PTX" in run.stderr


@needs_compiler
def test_it_builds_in_a_folder_of_any_name_and_leaves_out_architectures_that_are_too_old(tmp_path):
    clone = tmp_path / "my projects, home@work"
    (clone / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", clone)
    (clone / "csrc" / "one.cpp").write_text("int one() { return 1; }\n")
    run = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=clone,
                         env=environment(TORCH_CUDA_ARCH_LIST="7.5 8.0"), capture_output=True, text=True)
    assert run.returncode == 0 and (clone / "sae_csrc.so").exists(), run.stdout + run.stderr
    assert "no kernels for architecture 7.5 of TORCH_CUDA_ARCH_LIST: they need 8.0 or newer" in run.stderr


@needs_compiler
@pytest.mark.skipif(not torch.version.cuda, reason="torch is a CPU build")
@pytest.mark.parametrize("capability, too_old", [((7, 5), True), ((8, 0), False)])
def test_where_a_gpu_is_too_old_for_the_kernels_only_the_cpu_part_is_built(tmp_path, capability, too_old):
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.cuda\ntorch.cuda.device_count = lambda: 1\n"
        f"torch.cuda.get_device_capability = lambda i: {capability}\n"
        "torch.cuda.get_device_name = lambda i: 'T4'\n")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho release {torch.version.cuda}\n")
    nvcc.chmod(0o755)
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    run = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path,
                         env=environment(PYTHONPATH=str(tmp_path), CUDA_HOME=str(tmp_path)),
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    said = "building sae_csrc for the CPU only: the kernels need Ampere or newer, which this T4 is not"
    assert (said in run.stderr) == too_old


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run in a clone whose `make test` prints SAE_TEST_DATA -> what it printed."""
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci")
    (clone / "Makefile").write_text("test:\n\t@echo \"[$$SAE_TEST_DATA]\"\n")

    def run(**env):
        script = [clone / ".ci" / "run"]
        done = subprocess.run(script, env=environment(**env), cwd="/", capture_output=True, text=True,
                              check=True)
        return done.stdout.strip()
    return run


@needs_make
def test_the_check_finds_real_data_beside_the_clone(ci, tmp_path):
    assert ci() == "[]"
    (tmp_path / "shared").mkdir()
    assert ci() == f"[{tmp_path / 'shared'}]"
    assert ci(SAE_TEST_DATA="/elsewhere") == "[/elsewhere]"


@needs_make
def test_the_check_fails_when_a_test_fails(ci, tmp_path):
    (tmp_path / "clone" / "Makefile").write_text("test:\n\t@false\n")
    with pytest.raises(subprocess.CalledProcessError):
        ci()


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup.py"))
def test_the_program_imports_run_time_packages_alone(name):
    """Imports at the top of a file. What a function imports is optional; its own tests check it."""
    tree = ast.parse((ROOT / name).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    ours = {path.stem for path in ROOT.glob("*.py")}
    foreign = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names) - ours
    assert foreign <= RUN_TIME


def test_the_readme_names_options_files_and_functions_that_exist():
    text = (ROOT / "README.md").read_text()
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    programs = sources + (ROOT / "weights.sh").read_text() + (ROOT / "tests/miniature.py").read_text()
    torchrun = {"--nproc_per_node", "--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_endpoint",
                "--max-restarts", "--signals-to-handle", "--shutdown-timeout"}
    cited = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - torchrun - {"--no-build-isolation"}
    assert {option for option in cited if not re.search(rf"{option}(?![\w-])", programs)} == set()

    files = set(re.findall(r"`((?:csrc/|tests/)?[\w/]+\.(?:py|sh|cu|md))`", text))
    assert {name for name in files if not any((ROOT / at / name).exists() for at in (".", "csrc"))} == set()

    equations = text[text.index("The equations and where they are"):text.index("## Train")]
    names = {name.split(".")[-1] for name in re.findall(r"`(?:\w+\.py: )?([\w.]+)`", equations)}
    assert len(names) >= 7 and {name for name in names if f"def {name}(" not in sources} == set()
