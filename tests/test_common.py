"""What train.py and eval.py share: which files are images, which pixels they hold, and what is refused."""
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

import common
import train

ROOT = Path(train.__file__).parent


@pytest.fixture
def photos(tmp_path):
    """Two classes of six images; the pixels of the i-th of a class are all of the value 10 i."""
    for name in "cats", "dogs":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 40), (10 * i,) * 3).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


# ------------------------------------------------------------------ folders

def test_links_to_files_and_folders_are_followed_and_a_loop_is_walked_once(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for i in range(6):
        (photos / "cats" / f"{i}.png").rename(tmp_path / "elsewhere" / f"{i}.png")
    (photos / "cats/more").symlink_to(tmp_path / "elsewhere")
    (photos / "cats/7.png").symlink_to(tmp_path / "elsewhere/0.png")
    (photos / "dogs/again").symlink_to(photos / "dogs")                     # leads back up
    folder = common.ImageFolder(photos)
    assert folder.labels == [0] * 7 + [1] * 6 and len(set(folder.files)) == 13
    assert [Path(file).parent.name for file in folder.files[1:7]] == ["more"] * 6


def test_an_empty_class_is_refused_by_name(photos):
    for file in (photos / "dogs").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="dogs holds no images: fill it or remove it"):
        common.ImageFolder(photos)


def test_what_file_systems_leave_behind_is_no_class(photos):
    for name in "lost+found", "@eaDir", "__MACOSX", ".ipynb_checkpoints":
        (photos / name).mkdir()
        Image.new("RGB", (40, 40)).save(photos / name / "0.png")
    assert common.ImageFolder(photos).classes == ["cats", "dogs"]


SUFFIXES = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "JPG": "JPEG", "png": "PNG", "webp": "WEBP",
            "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "tga": "TGA",
            "jp2": "JPEG2000", "avif": "AVIF"}


def test_every_suffix_that_pillow_reads_counts_and_others_are_counted_in_a_line(tmp_path, capsys):
    readable = {s: kind for s, kind in SUFFIXES.items() if kind != "AVIF" or features.check("avif")}
    for suffix, kind in readable.items():
        Image.new("RGB", (40, 40), (200, 100, 50)).save(tmp_path / f"x.{suffix}", format=kind)
    for name in "a.txt", "b.txt", "c.csv", "README":
        (tmp_path / name).write_text("no image")
    folder = common.ImageFolder(tmp_path)
    assert {Path(file).suffix[1:] for file in folder.files} == readable.keys()
    assert all(common.load_image(file).size == (40, 40) for file in folder.files)
    said = capsys.readouterr().err
    assert f"{tmp_path}: left out, since they are no images: 2 .txt" in said
    assert "1 .csv" in said and "1 without a suffix" in said and said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(photos):
    (photos / "cats").chmod(0)
    with pytest.raises(PermissionError):
        common.ImageFolder(photos)


@pytest.mark.parametrize("out", ["run", "cats", "cats/run", "../photos/dogs/x.json"])
def test_an_output_inside_the_images_is_refused(out, photos):
    folder = common.ImageFolder(photos)
    with pytest.raises(ValueError, match="lies inside the images of"):
        common.refuse_output_inside(photos / out, folder)
    common.refuse_output_inside(photos.parent / "run", folder)              # beside them is no harm


def test_an_output_inside_a_linked_class_is_refused(photos, tmp_path):
    (photos / "cats").rename(tmp_path / "cats")
    (photos / "cats").symlink_to(tmp_path / "cats")
    with pytest.raises(ValueError, match="lies inside the images of"):
        common.refuse_output_inside(tmp_path / "cats/run", common.ImageFolder(photos))


def test_a_run_inside_its_images_is_refused_before_anything_is_written(photos):
    words = ["--stage", "1", "--data", str(photos), "--out", str(photos / "run"), "--encoder", "none"]
    with pytest.raises(ValueError, match="lies inside the images of"):
        train.main(words)
    assert not (photos / "run").exists()


# ------------------------------------------------------------------ pixels that decode are used

def gradient():
    return Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))


def test_an_orientation_beside_broken_metadata_still_turns_the_image(tmp_path):
    gradient().save(tmp_path / "x.png", exif=signed_rational_exif())
    expected = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(common.load_image(tmp_path / "x.png")), expected)


def signed_rational_exif():
    """Orientation 6 and an exposure bias of -1/0, which Pillow reads and cannot write again."""
    entries = [(0x0112, 3, 1, (6).to_bytes(4, "little")), (0x9204, 10, 1, (38).to_bytes(4, "little"))]
    body = len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        body += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
    rational = (-1).to_bytes(4, "little", signed=True) + bytes(4)
    return b"Exif\0\0II*\0" + (8).to_bytes(4, "little") + body + bytes(4) + rational


def test_an_exif_chunk_without_a_tiff_header_is_passed_over(tmp_path):
    gradient().save(tmp_path / "x.png", exif=b"Exif\0\0" + b"no header at all")
    assert np.array_equal(np.asarray(common.load_image(tmp_path / "x.png")), np.asarray(gradient()))


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "iCCP"])
def test_two_megabytes_of_compressed_text_or_profile_make_no_bad_image(chunk, tmp_path):
    buffer, data = io.BytesIO(), zlib.compress(bytes(2_000_000))
    gradient().save(buffer, format="png")
    head = {"zTXt": b"Comment\0\0", "iTXt": b"Comment\0\1\0\0\0", "iCCP": b"profile\0\0"}[chunk]
    body = head + data
    block = len(body).to_bytes(4, "big") + chunk.encode() + body
    block += zlib.crc32(chunk.encode() + body).to_bytes(4, "big")
    png = buffer.getvalue()
    (tmp_path / "x.png").write_bytes(png[:33] + block + png[33:])           # behind the header
    assert np.array_equal(np.asarray(common.load_image(tmp_path / "x.png")), np.asarray(gradient()))
    assert PngImagePlugin.MAX_TEXT_CHUNK >= 2_000_000


def test_an_image_of_too_many_pixels_is_named_with_the_mend(tmp_path, monkeypatch):
    gradient().save(tmp_path / "panorama.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="panorama.png has too many pixels: shrink it or remove it"):
        common.load_image(tmp_path / "panorama.png")


# ------------------------------------------------------------------ elsewhere

def test_the_commands_import_where_unix_modules_are_missing():
    """As on Windows: no resource, no fcntl; os.setsid and SIGHUP are looked for before they are used."""
    code = ("import sys; sys.modules |= dict.fromkeys(('resource', 'fcntl', 'pwd', 'grp'), None); "
            "import sae, common, train")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
