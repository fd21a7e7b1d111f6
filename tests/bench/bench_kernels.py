"""Candidates for the CUDA kernels beside the kernels of csrc: built, tested, then timed in turn.

    python tests/bench/bench_kernels.py FOLDER [NAME ...] [--turns 2] [--device cuda|cpu]

tests/candidates/NAME.patch is a change to csrc that is worth keeping only if it pays on a GPU; NAME begins
with its op. Each is applied to a copy of the project in FOLDER, built there and held to tests/test_ops.py;
one that fails is shown and not timed. The others take turns with csrc in bench_ops.py; "ratio" is a
candidate's time over that of csrc in the same turn, and what differs between turns is noise. 0 turns only
build and test, and what is in FOLDER already is not built again.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "tests" / "candidates").glob("*.patch"))


def apply(patch, tree):
    """`git apply` where there is no git: a hunk's old lines must occur once in their file."""
    for part in patch.read_text().split("--- a/")[1:]:
        name, *hunks = re.split(r"^@@.*\n", part, flags=re.M)
        path = tree / name.split()[0]
        text = path.read_text()
        for hunk in hunks:
            old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in which)
                        for which in (" -", " +"))
            if text.count(old) != 1:
                raise SystemExit(f"{patch.name}: occurs {text.count(old)} times in {path.name}:\n{old}")
            text = text.replace(old, new)
        path.write_text(text)


def make_tree(patch, folder):
    """A copy of all that is built, tested and timed, patched; its name tells csrc and patch from others."""
    crc = 0
    for path in (patch, *sorted((ROOT / "csrc").iterdir())):
        crc = zlib.crc32(path.read_bytes(), crc)
    tree = folder / f"{patch.stem}-{crc:08x}"
    if not tree.exists():
        new = tree.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        for name in ("csrc", "tests"):
            shutil.copytree(ROOT / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.py"):
            shutil.copy(path, new)
        apply(patch, new)
        new.rename(tree)
    return tree


def build_and_test(trees, device):
    """All at once. Returns the names of those that fail, with what they print."""
    command = ('"$0" setup.py -q build_ext --inplace && "$0" -c "import sae, sys; sys.exit(sae.NO_CSRC)" && '
               f'"$0" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "{device} and not compiled"')
    env = {"MAX_JOBS": str(-(-os.cpu_count() // max(1, len(trees)))), **os.environ, "SAE_TEST_CUDA": "1"}
    started = {}
    for name, tree in trees.items():
        if not (tree / "passed").exists():
            with open(tree / "log", "w") as log:
                started[name] = subprocess.Popen(["sh", "-c", command, sys.executable], cwd=tree, env=env,
                                                 stdout=log, stderr=log)
    try:
        for name, process in started.items():
            if process.wait() == 0:
                (trees[name] / "passed").touch()
    except KeyboardInterrupt:                                 # a time limit: those that still run have failed
        pass
    return {name: (trees[name] / "log").read_text() for name, p in started.items() if p.poll() != 0}


def time_turn(tree, ops, device, file):
    """{title: ms of ours} of bench_ops.py"""
    file.unlink(missing_ok=True)
    command = [sys.executable, "tests/bench/bench_ops.py", *ops, "--ours", "--device", device, "--json", file]
    subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL, check=True)
    results = map(json.loads, file.read_text().splitlines())
    return {result["title"]: result["ms"]["ours"] for result in results}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    args = parser.parse_args()
    patches = {p.stem: p for p in PATCHES}
    if unknown := set(args.names) - set(patches):
        parser.error(f"no candidate {', '.join(sorted(unknown))}: choose of {', '.join(patches)}")
    folder = args.folder.resolve()
    trees = {name: make_tree(patches[name], folder) for name in args.names or patches}
    failed = build_and_test(trees, args.device)
    for name in trees:
        print(f"{name}:", f"FAILS\n{failed[name][-3000:]}" if name in failed else "built, passes the tests")

    op = {name: name.split("-")[0] for name in trees if name not in failed}
    times = defaultdict(list)                                 # by name and title, in turn
    try:
        for name in ("csrc", *op) * (args.turns if op else 0):
            tree, ops = (ROOT, sorted(set(op.values()))) if name == "csrc" else (trees[name], [op[name]])
            for title, ms in time_turn(tree, ops, args.device, folder / "times").items():
                times[name, title].append(ms)
    except (KeyboardInterrupt, subprocess.CalledProcessError) as e:
        failed["the rest"] = repr(e)
        print(f"{name} is not timed to the end: {e!r}")       # what was timed counts
    if times:
        print(f"\n{'candidate':12s}{'case':76s}ms of csrc and ratio, turn by turn")
    for (name, title), ours in times.items():
        if name != "csrc":
            csrc = times["csrc", title]
            ratios = " ".join(f"{a / b:.3f}" for a, b in zip(ours, csrc))
            print(f"{name:12s}{title:76s}{' '.join(f'{ms:.4f}' for ms in csrc)}   {ratios}")
    sys.exit(bool(failed))
