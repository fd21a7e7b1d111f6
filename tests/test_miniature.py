"""The miniature: rows are kept, the table is of their numbers, and it goes on where it was interrupted."""
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import generation
import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from sae import DINOv3, DINOv3Config
from sae_weights import save_safetensors

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The words of a miniature of two steps a stage on 2 x 24 images of noise, and where its results go."""
    root, rng = tmp_path_factory.mktemp("miniature"), np.random.default_rng(0)
    for i in range(48):
        path = root / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    save_safetensors(DINOv3(DINOv3Config(64, 2, 64, 128)).state_dict(), root / "encoder.safetensors")
    words = ["--data", root / "photos", "--encoder", root / "encoder.safetensors", "--size", 32,
             "--steps", 2, 2, "--widths", 32, 32, 16, "--batch", 4, "--out", root / "out"]
    return words, root


def call(script, *words):
    command = [sys.executable, ROOT / "tests" / script, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}             # other numbers of threads add in another order
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env)


def run(words, *rows):
    done = call("miniature.py", *words, "--rows", *rows)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_that_are_there_are_kept_and_the_others_are_added_to_table_and_figure(world):
    words, root = world
    first = run(words, "Freeze", "reg 100")
    assert first.count("$ python train.py") == 2 and first.count("$ python eval.py") == 2
    kept = (root / "out/rows/reg-100-seed0.json").read_bytes()
    assert str(root).encode() not in kept                   # a row can be shown to others

    second = run(words, "Freeze", "reg 100", "E2E")         # its stage 1 is that of Freeze
    assert second.count("$ python train.py") == 1 and "--reg 0" in second and "--resume" not in second
    assert (root / "out/rows/reg-100-seed0.json").read_bytes() == kept
    assert [line.split("|")[1].strip() for line in (root / "out/rows.md").read_text().splitlines()] == [
        "row", "---", "Freeze", "reg 100", "E2E"]
    for picture in "out/rows.png", "out/demo.png", "out/one.png":
        with Image.open(root / picture) as image:
            image.verify()


def test_rows_of_other_settings_are_not_mixed(world):
    words, root = world
    run(words, "Freeze")
    done = call("miniature.py", *words, "--rows", "E2E", "--batch", 5)
    assert done.returncode == 1 and "was made with another --batch: give" in done.stderr


def test_a_row_that_was_interrupted_after_its_training_is_scored_and_a_frozen_encoder_has_not_moved(world):
    words, root = world
    run(words, "Freeze")
    found = json.loads((root / "out/rows/freeze-seed0.json").read_text())
    assert found["scores"]["mse/var"] == 0
    (root / "out/rows/freeze-seed0.json").unlink()
    assert "train.py" not in run(words, "Freeze")           # `done` stands beside it
    assert json.loads((root / "out/rows/freeze-seed0.json").read_text()) == found


def test_the_painted_components_are_those_of_numpys_svd():
    maps = torch.randn(6, 10, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[:, :3] *= torch.tensor([9, 6, 3])[None, :, None, None]
    rows = maps.movedim(1, -1).reshape(-1, 10).numpy()
    basis = np.linalg.svd(rows - rows.mean(0))[2][:3].T
    assert np.allclose(np.abs(miniature.Principal(maps).basis.T.numpy() @ basis), np.eye(3), atol=1e-5)


def test_the_table_gives_means_and_deviations_over_the_seeds():
    rows = {"Freeze": [{"probe": p, "PSNR": db} for p, db in ((90.0, 20.0), (91.0, 21.0), (95.0, 22.0))],
            "E2E": [{"probe": 40.0, "PSNR": 25.0}]}
    spread = statistics.stdev([90, 91, 95])
    assert miniature.table(rows).splitlines()[2:] == [
        f"| Freeze | 3 | 92.0 ± {spread:.1f} | 21.00 ± 1.00 | 88.4, 19.39 |",
        "| E2E | 1 | 40.0 | 25.00 | 12.4, 41.35 |"]


def test_samples_and_losses_of_small_dits_on_the_rows_are_tables_and_a_picture(world):
    words, root = world
    run(words, "Freeze", "E2E")
    done = call("generation.py", "--runs", root / "out", "--rows", "Freeze", "E2E", "--steps", 2, 2,
                "--images", 1, "--seeds", 0)
    assert done.returncode == 0, done.stderr

    folder, _, images = (root / "out/generation.md").read_text().split("\n\n")
    record = root / "out/generation/folder/freeze-reg0/0-last/metrics.jsonl"
    scores = json.loads(record.read_text().splitlines()[-1])
    assert folder.splitlines()[3].startswith(f"| E2E | {scores['class_gen']:.1f} |")
    # n is 64: no DiT of these widths is below it, so no latent loss has a floor
    assert [[line.split("|")[i].strip() for i in (1, 4)] for line in images.splitlines()[2:]] == [
        ["v, 96", "0.00"], ["v, 192", "0.00"], ["v, 384", "0.00"], ["x, 96", "0.00"]]
    with Image.open(root / "out/generation.png") as picture:
        assert picture.size == (110 + 2 * 128, 30 + 2 * 128)


def test_the_share_of_opposite_pairs_counts_those_that_the_two_losses_order_differently():
    scores = {name: {"latent_loss": latent, "rgb_l1": rgb}
              for name, latent, rgb in (("a", 1, 3), ("b", 2, 1), ("c", 3, 2))}
    assert generation.opposite([scores]) == pytest.approx(100 * 2 / 3)      # a and b, a and c


def test_the_tables_are_of_the_rows_that_are_kept_and_the_readmes_are_of_those_tables():
    for name in "tradeoff", "photos":
        assert (ROOT / f"tests/{name}.md").read_text() == miniature.table(
            miniature.read_results(ROOT / "tests" / name))

    names = "tradeoff", "photos", "generation"
    written = "".join((ROOT / f"tests/{name}.md").read_text() for name in names)
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = [table for table in tables if table.startswith(("| row |", "| DiT on |"))]
    assert len(shown) == 2
    for table in shown:
        assert set(table.splitlines()) <= set(written.splitlines())
