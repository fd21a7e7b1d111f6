"""What train.py and eval.py share: which files are images, which pixels they hold, and what is refused."""
import gzip
import io
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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


# ------------------------------------------------------------------ tars

def pack(folder, out, label=("cls", "{}"), tars=2):
    """Class folders of PNGs as WebDataset's tars, in no order: NAME.png and NAME.cls or NAME.json."""
    paths = np.random.default_rng(0).permutation(sorted(folder.rglob("*.png")))
    out.mkdir(parents=True)
    for i in range(tars):
        with tarfile.open(out / f"{i}.tar", "w") as tar:
            for path in paths[i::tars]:
                name = path.relative_to(folder)
                add(tar, str(name), path.read_bytes())
                add(tar, str(name.with_suffix("." + label[0])), label[1].format(name.parent).encode())
    return out


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(photos, tmp_path):
    return pack(photos, tmp_path / "tars")


def assert_same_images(tars, folder, labels=True):
    got, oracle = common.ImageFolder(tars), common.ImageFolder(folder)
    assert [file.name for file in got.files] == [str(Path(file).relative_to(folder)) for file in oracle.files]
    for ours, theirs in zip(got.files, oracle.files):
        assert np.array_equal(np.asarray(common.load_image(ours)), np.asarray(common.load_image(theirs)))
    assert not labels or (got.labels, got.classes) == (oracle.labels, oracle.classes)


@pytest.mark.parametrize("label", [("cls", "{}"), ("cls", " {}\n"), ("json", '{{"label": {}, "cls": 0}}'),
                                   ("json", '{{"caption": "a dog", "cls": "{}"}}')])
def test_tars_are_read_as_the_same_images_in_class_folders(label, photos, tmp_path):
    for old, new in ("cats", "2"), ("dogs", "10"):          # numbers, which are sorted by value in both
        (photos / old).rename(photos / new)
    assert_same_images(pack(photos, tmp_path / "tars", label), photos)
    assert common.ImageFolder(photos).classes == ["2", "10"]


@pytest.mark.parametrize("style", ["gnu", "pax"])
def test_tars_of_the_tar_command_without_labels_are_images_without_classes(style, photos, tmp_path):
    (photos / "cats/5.png").rename(photos / "cats" / ("long " * 30 + "ä.v2.png"))
    for hidden in "cats/._0.png", "__MACOSX/0.png":
        (photos / hidden).parent.mkdir(exist_ok=True)
        (photos / hidden).write_bytes(b"no image")
    (tmp_path / "tars").mkdir()
    words = ["tar", f"--format={style}", "-cf", tmp_path / "tars/0.tar", "-C", photos, "."]
    subprocess.run(words, check=True)
    assert_same_images(tmp_path / "tars", photos, labels=False)
    assert set(common.ImageFolder(tmp_path / "tars").labels) == {0}


@pytest.mark.parametrize("about", ['["a list"]', '{{"label": null}}', '{{"caption": "{}"}}'])
def test_a_json_without_a_label_is_no_label(about, photos, tmp_path):
    assert common.ImageFolder(pack(photos, tmp_path / "tars", ("json", about))).classes == [""]


def test_a_label_belongs_to_the_name_up_to_the_last_dot_else_as_webdataset_has_it_to_the_first(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in "a/0.img.png", "b/1.5.png":
            add(tar, name, b"")
        add(tar, "a/0.cls", b"7")
        add(tar, "b/1.5.cls", b"8")
    folder = common.ImageFolder(tmp_path)
    assert [folder.classes[label] for label in folder.labels] == ["7", "8"]


def test_the_path_of_a_member_is_the_one_in_a_folder(tars):
    file = common.ImageFolder(tars).files[0]
    assert Path(file).relative_to(tars).parts[1:] == ("cats", "0.png") and str(file) == str(Path(file))


def test_the_index_of_tars_is_made_once_and_anew_when_a_tar_has_changed(photos, tars, monkeypatch):
    first = common.ImageFolder(tars)
    assert {path.name for path in tars.iterdir()} == {"0.tar", "1.tar", ".index.json"}
    read = []
    monkeypatch.setattr(common, "read_tar", lambda path, f=common.read_tar: read.append(path) or f(path))
    again = common.ImageFolder(tars)
    assert not read and (again.files, again.labels) == (first.files, first.labels)
    with tarfile.open(tars / "1.tar", "a") as tar:
        tar.add(photos / "cats/0.png", "cats/6.png")
        add(tar, "cats/6.cls", b"cats")
    os.utime(tars / "1.tar", (1, 1))                            # its size may be as before
    assert len(common.ImageFolder(tars)) == 13 and len(read) == 2
    (tars / ".index.json").write_text('[[["0.tar"')             # as two jobs that start at once may leave it
    assert len(common.ImageFolder(tars)) == 13 and len(read) == 4
    (tars / ".index.json").write_text("5")                      # as another version may have left it
    assert len(common.ImageFolder(tars)) == 13 and len(read) == 6
    (tars / ".index.json").unlink()
    monkeypatch.setenv("RANK", "1")
    assert len(common.ImageFolder(tars)) == 13 and not (tars / ".index.json").exists()


def test_tars_in_a_folder_that_cannot_be_written_are_read_each_time(tars, monkeypatch, capsys):
    def refuse(path, save):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(common, "write", refuse)
    assert len(common.ImageFolder(tars)) == 12
    said = capsys.readouterr().err
    assert ".index.json cannot be kept (Permission denied), and each start reads all tars: name" in said


def test_a_tar_that_is_cut_short_anywhere_is_refused(tars):
    whole = (tars / "0.tar").read_bytes()
    with tarfile.open(tars / "0.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512                                # behind it, all is zeros
    for size in [*range(0, end, 512), *range(100, end, 512)]:
        (tars / "0.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"0.tar cannot be read from .* on \(.*\): pack it again"):
            common.ImageFolder(tars)
    with pytest.raises(ValueError, match=f"0.tar cannot be read from {last.name} on"):
        common.read_tar(tars / "0.tar")


def test_a_tar_with_a_damaged_header_is_refused_by_the_member_before_it(tars):
    with tarfile.open(tars / "0.tar") as tar:
        before, damaged = tar.getmembers()[3:5]
    with open(tars / "0.tar", "r+b") as file:
        file.seek(damaged.offset)
        file.write(b"?")
    with pytest.raises(ValueError, match=f"0.tar cannot be read from {before.name} on .no header follows"):
        common.ImageFolder(tars)


def test_a_damaged_image_in_a_tar_is_named_with_its_tar(tars):
    file = common.ImageFolder(tars).files[0]
    with open(file.tar, "r+b") as tar:
        tar.seek(file.offset)
        tar.write(b"no png")
    with pytest.raises(ValueError, match=r"tars/[01].tar/cats/0.png cannot be read as an image"):
        common.load_image(file)


def spoil(tars, how):
    if how == "compressed":
        (tars / "1.tar.gz").write_bytes(gzip.compress((tars / "1.tar").read_bytes()))
        (tars / "1.tar").unlink()
    elif how == "link":
        (tars / "x.png").symlink_to("elsewhere.png")
        with tarfile.open(tars / "0.tar", "a") as tar:
            tar.add(tars / "x.png", "x.png")
        (tars / "x.png").unlink()
    else:
        with tarfile.open(tars / "0.tar", "a") as tar:
            add(tar, *{"bare": ("x.png", b"?"), "json": ("x.json", b"{"), "cls": ("x.cls", b"\xff")}[how])


@pytest.mark.parametrize("how, sentence", [
    ("compressed", "1.tar.gz cannot be read from its start on .*: pack it again, not compressed"),
    ("link", "0.tar cannot be read from x.png on .it is a link.: pack it again, .*without links"),
    ("bare", "0.tar/x.png has no label, and other images have one: give one to all"),
    ("json", "0.tar cannot be read from x.json on .Expecting property name"),
    ("cls", "0.tar cannot be read from x.cls on .*codec can't decode"),
])
def test_tars_that_cannot_be_used_are_refused_in_a_sentence(how, sentence, tars):
    spoil(tars, how)
    with pytest.raises(ValueError, match=sentence) as refusal:
        common.ImageFolder(tars)
    assert "\n" not in str(refusal.value)


def test_tars_without_images_and_tars_beside_images_or_folders_are_refused(photos, tars, tmp_path):
    with pytest.raises(ValueError, match="empty holds no images: .* name another with --encode"):
        (tmp_path / "none").mkdir()
        common.ImageFolder(pack(tmp_path / "none", tmp_path / "empty"), option="--encode")
    (photos / "cats").rename(tars / "cats")
    with pytest.raises(ValueError, match="tars holds the folder cats and the tar 0.tar: it takes"):
        common.ImageFolder(tars)
    (tars / "cats/0.png").rename(tars / "0.png")
    (tars / "cats").rename(tmp_path / "cats")
    with pytest.raises(ValueError, match=r"tars holds images \(0.png\) and the tar 0.tar: it takes"):
        common.ImageFolder(tars)


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


class MillionCrops(torch.utils.data.Dataset):
    """A million crops, of which every `every`-th has met a bad file."""

    def __init__(self, every):
        self.every = every

    def __len__(self):
        return 1_000_000

    def __getitem__(self, g):
        return torch.zeros(1, 1, 3, dtype=torch.uint8), [f"{g} is bad"] * (g % self.every == 0)


@pytest.mark.parametrize("every, stopped", [(25, True), (110, False)])
def test_too_many_bad_files_stop_a_rank_before_it_has_seen_all_files(every, stopped, capsys):
    args = SimpleNamespace(batch=50, workers=0)
    crops = common.batches(MillionCrops(every), range(200), args, rank=5, world=8)
    if stopped:
        with pytest.raises(ValueError, match="more than 1 % of the 1000000 images cannot be used, such as"):
            list(crops)
    else:
        assert len(list(crops)) == 200


def test_a_member_that_is_no_image_has_the_same_sentence_each_time(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"<html>")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "0.jpg", "0.jpg")
    (tmp_path / "0.jpg").unlink()
    member, = common.ImageFolder(tmp_path).files
    sentences, kept = set(), []
    for _ in range(3):
        with pytest.raises(ValueError) as error:
            common.load_image(member)
        sentences.add(str(error.value))
        kept.append(error)                      # so that what it was read from has another address each time
    assert sentences == {f"{member} cannot be read as an image: Pillow knows no such kind"}


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
