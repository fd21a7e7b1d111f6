"""The set-up: what make and .ci/run would do, without doing it, and what the files may import."""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN_TIME = {"torch", "torchvision", "numpy", "PIL", "lpips", "scipy", "tqdm"}          # lpips brings torchvision and tqdm

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


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
    """Without what a `make test` around this one has set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "SAE_TEST_DATA"))} | env


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
    torch, package = [next(i for i, line in enumerate(lines) if word in line) for word in ("'torch>=2.11'", "-e .")]
    assert torch < package and "--no-build-isolation" in lines[package]


@needs_make
@pytest.mark.parametrize("goal, done", [("setup", ["torch", "setup"]), (".venv/test.stamp", ["torch", "test"])])
def test_a_second_run_installs_nothing_until_a_source_changes(tree, goal, done):
    assert make(tree, "-q", goal).returncode == 1
    stamps(tree, *done)
    assert make(tree, "-q", goal).returncode == 0
    for source in "csrc/kernel.cu", "setup.py":
        os.utime(tree / source, (99, 99))
        assert make(tree, "-q", goal).returncode == 1
        os.utime(tree / source, (1, 1))


@needs_make
@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (2, 7, 18)])
def test_an_unsuited_python_is_refused_before_anything_is_made(tree, version):
    fake = tree / "python"
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    fake.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{pretend}' \"$@\"\n")
    fake.chmod(0o755)
    run = make(tree, "setup", f"PYTHON={fake}")
    assert run.returncode and f"is Python {version[0]}.{version[1]}; S-AE needs 3.10 to 3.13" in run.stderr
    assert not (tree / ".venv").exists()


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run in a clone whose `make test` prints SAE_TEST_DATA -> what it printed."""
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci")
    (clone / "Makefile").write_text("test:\n\t@echo \"[$$SAE_TEST_DATA]\"\n")

    def run(**env):
        script = [clone / ".ci" / "run"]
        return subprocess.run(script, env=environment(**env), cwd="/", capture_output=True, text=True, check=True).stdout.strip()
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
    """Imports at the top of a file; what is imported inside a function is optional and checked by its own tests."""
    tree = ast.parse((ROOT / name).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    foreign = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names) - {"sae", "train", "eval"}
    assert foreign <= RUN_TIME
