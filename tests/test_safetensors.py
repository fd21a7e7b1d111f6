"""load_safetensors and save_safetensors against the safetensors library: same files, tensors and bytes."""
import json
import os
import resource
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from sae_weights import SAFETENSORS_DTYPES, load_safetensors, save_safetensors

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


# ------------------------------------------------------------------ helpers

def write(path, header, data=b"", length=None):
    """A file from a header (JSON, text or bytes), the data, and a header length that may be a lie."""
    header = header if isinstance(header, (str, bytes)) else json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def library(path):
    """The library's tensors, or None where it refuses the file."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, TypeError, FileNotFoundError):     # TypeError: torch's reshape, over 2^63
        return None


def ours(path):
    """Our tensors and no problem, or none and the sentence; any other exception is a failure of the test."""
    try:
        return load_safetensors(path), ""
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None, str(error)


def same(a, b):
    """Same names in the same order, dtypes, shapes and bits. The library leaves the order of tensors without
    items to chance."""
    if a.keys() != b.keys() or [k for k in a if a[k].numel()] != [k for k in b if b[k].numel()]:
        return False
    return all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k]))
               for k in a)


def bits(t):
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def stricter_on_purpose(path):
    """Whether the file shows one of the three things that load_safetensors refuses and the library takes."""
    twice = []

    def pairs(items):
        twice.extend(k for i, (k, _) in enumerate(items) if k in dict(items[:i]))
        return dict(items)

    raw = path.read_bytes()
    header = json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]], object_pairs_hook=pairs)
    header.pop("__metadata__", None)
    if twice or any(not isinstance(e, dict) or not isinstance(e["dtype"], str) for e in header.values()):
        return True
    return any(e["data_offsets"][0] % SAFETENSORS_DTYPES[e["dtype"]].itemsize for e in header.values())


def compare(path):
    theirs, (mine, problem) = library(path), ours(path)
    if theirs is not None and mine is None:
        assert stricter_on_purpose(path), problem
        return
    assert (theirs is None) == (mine is None), problem
    assert mine is None or same(theirs, mine)


characters = st.characters(exclude_categories=["Cs"])
names = st.text(characters, max_size=8).filter(lambda name: name != "__metadata__")
dtypes = st.sampled_from(list(SAFETENSORS_DTYPES.values()))


@st.composite
def tensors(draw):
    """Random bits in a random dtype and shape, some of them strided views."""
    dtype, shape = draw(dtypes), draw(st.lists(st.integers(0, 4), max_size=4))
    if dtype == torch.float4_e2m1fn_x2 and not shape:
        shape = [1]                                     # the format counts half bytes in the last dimension
    count = torch.Size(shape).numel() * dtype.itemsize
    t = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    t = (t % 2 if dtype == torch.bool else t).view(dtype).reshape(shape)
    return t.transpose(0, 1) if t.ndim > 1 and draw(st.booleans()) else t


state_dicts = st.dictionaries(names, tensors(), max_size=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


# ------------------------------------------------------------------ valid files, both ways

@FUZZ
@given(state_dicts, st.none() | st.dictionaries(names, names, max_size=1))
def test_our_file_has_the_librarys_bytes(path, state, metadata):
    assume(state or metadata != {})                     # for this pair safetensors 0.8 writes broken JSON
    save_safetensors(state, path, metadata)
    dense = {k: t.contiguous().clone() for k, t in state.items()}
    assert path.read_bytes() == safetensors.torch.save(dense, metadata)


@FUZZ
@given(state_dicts, st.dictionaries(names, names, max_size=3))
def test_the_library_reads_what_we_write(path, state, metadata):
    save_safetensors(state, path, metadata)
    read = safetensors.torch.load_file(path)
    assert same({k: state[k] for k in read}, read) and len(read) == len(state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


@FUZZ
@given(state_dicts, st.none() | st.dictionaries(names, names, max_size=3))
def test_we_read_what_the_library_writes(path, state, metadata):
    assume(state or metadata != {})                     # for this pair safetensors 0.8 writes broken JSON
    dense = {k: t.contiguous().clone() for k, t in state.items()}
    safetensors.torch.save_file(dense, path, metadata)
    read = load_safetensors(path)
    assert same(safetensors.torch.load_file(path), read) and len(read) == len(state)


# ------------------------------------------------------------------ damaged files, with the library as oracle

@FUZZ
@given(st.data())
def test_same_decision_when_bytes_of_the_file_change(path, data):
    state = data.draw(state_dicts)
    raw = bytearray(safetensors.torch.save({k: t.contiguous().clone() for k, t in state.items()}))
    for _ in range(data.draw(st.integers(1, 3))):
        head = 8 + struct.unpack("<Q", (bytes(raw[:8]) + bytes(8))[:8])[0]
        at = data.draw(st.integers(0, max(0, min(len(raw), head) - 1)), label="position")
        kind = data.draw(st.sampled_from(["set", "digit", "cut", "grow", "copy", "length"]))
        if kind == "set":
            raw[at:at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "digit":
            raw[at:at + 1] = data.draw(st.sampled_from(list(b'0123456789-.e[]{},:" F'))).to_bytes(1, "little")
        elif kind == "cut":
            del raw[at:at + data.draw(st.integers(1, 20))]
        elif kind == "grow":
            raw[at:at] = data.draw(st.binary(max_size=9))
        elif kind == "copy":
            raw[at:at] = raw[at:at + data.draw(st.integers(1, 60))]
        else:
            raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2 * len(raw)) | st.integers(0, 2 ** 64 - 1)))
    path.write_bytes(raw)
    compare(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 65, 2 ** 65) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["F32", "U8", "F6_E2M3", "f32", [0, 8], [8, 0], [0], [], 0, 8, 2 ** 63, 1e400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5)


@FUZZ
@given(st.data())
def test_same_decision_when_the_header_changes(path, data):
    """Fields replaced, dropped, added and repeated; with nan, infinities, half surrogates and padding."""
    state = data.draw(st.dictionaries(names, tensors(), min_size=1, max_size=4))
    metadata = data.draw(st.sampled_from([None, {"a": "b"}]))
    raw = safetensors.torch.save({k: t.contiguous().clone() for k, t in state.items()}, metadata)
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8:head]), raw[head:]
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(list(header)) if header else st.just("new"))
        entry = header.get(name)
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", None]))
        if field is None or not isinstance(entry, dict):
            header[data.draw(st.sampled_from([name, "new", "__metadata__"]))] = data.draw(json_values)
        elif data.draw(st.booleans()):
            entry[field] = data.draw(json_values)
        else:
            entry.pop(field, None)
    if data.draw(st.booleans()) and header:             # shifted offsets: holes, overlaps, misalignment
        entry = header[data.draw(st.sampled_from(list(header)))]
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            shift = data.draw(st.integers(-2, 2))
            entry["data_offsets"] = [x + shift if isinstance(x, int) else x for x in entry["data_offsets"]]
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans()))
    assume(text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text))
    write(path, " " * data.draw(st.integers(0, 8)) + text, body)
    compare(path)


@pytest.mark.parametrize("shape, nbytes", [
    ([0], 0), ([3, 0], 0), ([0, 2 ** 62, 4], 0), ([2 ** 62, 4, 0], 0), ([2 ** 63, 0], 0), ([0, 2 ** 64], 0),
    ([0, -1], 0), ([1] * 70, 4), ([], 4)])
def test_same_decision_on_extreme_shapes(path, shape, nbytes):
    write(path, {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}, bytes(nbytes))
    compare(path)


@pytest.mark.parametrize("shape, nbytes", [
    ([4], 2), ([3], 1), ([3], 2), ([2, 3], 3), ([3, 2], 3), ([0, 3], 0), ([0], 0), ([], 0), ([], 1)])
def test_same_decision_on_half_bytes(path, shape, nbytes):
    entry = {"dtype": "F4", "shape": shape, "data_offsets": [0, nbytes]}
    write(path, {"w": entry}, bytes(range(1, nbytes + 1)))
    compare(path)


@pytest.mark.parametrize("dtype", [
    *SAFETENSORS_DTYPES, "F6_E2M3", "F6_E3M2", "C128", "I4", "f32", "", None, 7])
@pytest.mark.parametrize("nbytes", [2, 3, 4, 6, 8, 16, 32])
def test_same_decision_on_every_dtype_and_size(path, dtype, nbytes):
    entry = {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, nbytes]}
    write(path, {"w": entry}, bytes(range(1, nbytes + 1)))
    compare(path)


@pytest.mark.parametrize("text", [
    '{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
    '{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0.0]}}',
    "  {}", "{}\n\t ", "{}\0", "{}x", "", "[]", "null", "\ufeff{}", "{,}",
    '{"__metadata__":null}', '{"__metadata__":{}}', '{"__metadata__":{"a":1}}', '{"__metadata__":[]}',
    '{"__metadata__":false}', '{"__metadata__":{"a":"\\ud800"}}', '{"__metadata__":{"a":"\\ud83d\\ude00"}}'])
def test_same_decision_on_headers_without_data(path, text):
    compare(write(path, text))


# ------------------------------------------------------------------ one test per kind of bad file

def second(**fields):
    """A header whose tensor v is right and takes 8 bytes, and whose tensor w has the fields given."""
    return {"v": ENTRY, "w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16], **fields}}


BAD = {
    "truncated data": (second(), 12, "'w'", "the file ends"),
    "unknown dtype": (second(dtype="bogus"), 16, "'w'", "'bogus'"),
    "wrong byte count for the shape": (second(shape=[3]), 16, "'w'", "takes 12 bytes", "8 and 16"),
    "overlapping offsets": (second(data_offsets=[4, 12]), 12, "'w'", "byte 4", "ends at 8"),
    "a hole between tensors": (second(data_offsets=[12, 20]), 20, "'w'", "byte 12", "ends at 8"),
    "offsets beyond the file": (
        second(shape=[2 ** 40], data_offsets=[8, 8 + 2 ** 42]), 16, "'w'", "the file ends"),
    "offsets backwards": (second(data_offsets=[8, 0]), 16, "'w'", "8 and 0"),
    "misaligned offsets": (
        {"v": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": {**ENTRY, "data_offsets": [1, 9]}},
        9, "'w'", "misaligned", "byte 1"),
    "negative dimension": (second(shape=[-2]), 16, "'w'", "[-2"),
    "more items than 64 bits can count": (second(shape=[2 ** 62, 2 ** 62]), 16, "'w'", "64 bits"),
    "three offsets": (second(data_offsets=[8, 16, 16]), 16, "'w'", "[8, 16, 16]"),
    "missing offsets": ({"w": {"dtype": "F32", "shape": [2]}}, 8, "'w'", "data_offsets"),
    "an entry that is null": ({"w": None}, 8, "'w'", "None"),
    "duplicate tensor": ('{"w": %s, "w": %s}' % (json.dumps(ENTRY), json.dumps(ENTRY)), 8, "'w'", "twice"),
    "duplicate field": ('{"w": {"dtype": "F32", %s}' % json.dumps(ENTRY)[1:], 8, "'dtype'", "twice"),
    "metadata that is no string": ({"__metadata__": {"a": 1}, "w": ENTRY}, 8, "__metadata__"),
    "invalid JSON": ('{"w": ', 8, "JSON"),
    "a header that is not UTF-8": (b'{"\xff": 1}', 8, "JSON"),
    "brackets nested without end": ("[" * 100_000, 8, "JSON"),
    "a number out of range": ('{"w": 1%s}' % ("9" * 400), 8, "9999", "range"),
    "bytes after the last tensor": ({"w": ENTRY}, 12, "end at byte", "file at"),
}


@pytest.mark.parametrize("header, nbytes, words", [(h, n, w) for h, n, *w in BAD.values()], ids=BAD)
def test_a_bad_file_gives_one_sentence_with_file_and_tensor(path, header, nbytes, words):
    tensors, problem = ours(write(path, header, bytes(nbytes)))
    assert tensors is None
    for word in words:
        assert word in problem


def test_a_header_longer_than_the_file_is_an_error_and_allocates_nothing(tmp_path):
    for length in (3, 2 ** 20, 2 ** 63, 2 ** 64 - 1):
        path = write(tmp_path / "x.safetensors", "{}", length=length)
        assert library(path) is None and str(length) in ours(path)[1]
    for size in range(8):
        path.write_bytes(bytes(size))
        assert library(path) is None and f"{size} bytes" in ours(path)[1]


def test_a_header_over_the_librarys_limit_is_an_error(tmp_path):
    """100 000 000 bytes are read, one more is not; the file is sparse and takes no room."""
    path = write(tmp_path / "x.safetensors", "{}", length=100_000_001)
    os.truncate(path, 100_000_009)
    assert library(path) is None and "limit" in ours(path)[1]


def test_a_missing_file_and_a_folder_are_the_systems_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        load_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(IsADirectoryError):
        load_safetensors(tmp_path)


# ------------------------------------------------------------------ the mapping

def test_tensors_can_be_written_to_and_the_file_stays(tmp_path):
    save_safetensors({"w": torch.ones(3)}, tmp_path / "x")
    w = load_safetensors(tmp_path / "x")["w"]
    w.mul_(2)
    assert w.tolist() == [2, 2, 2] and load_safetensors(tmp_path / "x")["w"].tolist() == [1, 1, 1]


def test_tensors_outlive_the_file_that_replaces_theirs(tmp_path):
    save_safetensors({"w": torch.ones(3)}, tmp_path / "x")
    w = load_safetensors(tmp_path / "x")["w"]
    save_safetensors({"w": torch.zeros(2000)}, tmp_path / "x")
    assert w.tolist() == [1, 1, 1]
    os.remove(tmp_path / "x")
    assert w.tolist() == [1, 1, 1]


def test_one_tensor_pickles_without_its_neighbours(tmp_path):
    save_safetensors({"small": torch.ones(3), "big": torch.zeros(100_000)}, tmp_path / "x")
    torch.save(load_safetensors(tmp_path / "x")["small"], tmp_path / "small.pt")
    assert os.path.getsize(tmp_path / "small.pt") < 5000


def test_tensors_are_aligned_even_after_a_header_of_odd_length(tmp_path):
    for pad in range(8):
        path = write(tmp_path / "x", json.dumps({"w": ENTRY}) + " " * pad, struct.pack("<2f", 1, 2))
        w = load_safetensors(path)["w"]
        assert w.data_ptr() % 4 == 0 and w.tolist() == [1, 2]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_nothing_is_read_before_use(tmp_path):
    size = 64 << 20
    save_safetensors({"a": torch.ones(size // 4)}, tmp_path / "x")
    start = resident()
    tensors = load_safetensors(tmp_path / "x")
    assert resident() - start < size / 8
    assert tensors["a"].sum() == size // 4
    assert resident() - start > size * 7 / 8


def test_tensors_can_be_written_to_and_the_file_and_their_neighbours_do_not_change(tmp_path):
    # 20 kB each: they share the pages at their ends.
    save_safetensors({k: torch.ones(5000) for k in "abc"}, tmp_path / "x")
    tensors = load_safetensors(tmp_path / "x")
    tensors["a"].fill_(2), tensors["c"].fill_(2)
    assert tensors["a"].sum() == tensors["c"].sum() == 10000 and tensors["b"].sum() == 5000
    assert all(t.sum() == 5000 for t in load_safetensors(tmp_path / "x").values())


# ------------------------------------------------------------------ the writer

def test_views_shared_memory_and_lazy_conjugates_are_written_as_their_values(tmp_path):
    x = torch.randn(4, 6, requires_grad=True)
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    state = {"x": x, "t": x.t(), "slice": x[1:3, ::2], "expand": x[:1].expand(5, 6), "scalar": x[0, 0],
             "conj": z.conj(), "neg": torch._neg_view(torch.ones(3))}
    save_safetensors(state, tmp_path / "x")
    read = safetensors.torch.load_file(tmp_path / "x")
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k].detach()) for k in state)


def test_the_bytes_depend_on_content_alone(tmp_path):
    state, metadata = {"b": torch.ones(3), "a": torch.zeros(2)}, {"y": "1", "x": "2"}
    save_safetensors(state, tmp_path / "1", metadata)
    save_safetensors(dict(reversed(state.items())), tmp_path / "2", dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("state, metadata, words", [
    ({"w": torch.ones(2, dtype=torch.complex128)}, None, ["'w'", "complex128"]),
    ({"w": torch.ones(2).to_sparse()}, None, ["'w'", "dense"]),
    ({"w": torch.ones(2, device="meta")}, None, ["'w'", "dense"]),
    ({"w": [1.0]}, None, ["'w'"]),
    ({"__metadata__": torch.ones(2)}, None, ["__metadata__"]),
    ({7: torch.ones(2)}, None, ["7"]),
    ({"\ud800": torch.ones(2)}, None, ["surrogates"]),
    ({"w": torch.ones(2)}, {"step": 3}, ["metadata"]),
])
def test_what_the_format_cannot_hold_is_one_sentence_and_no_file(tmp_path, state, metadata, words):
    with pytest.raises(ValueError) as error:
        save_safetensors(state, tmp_path / "x", metadata)
    assert all(word in str(error.value) for word in words) and os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """The full disk is a limit on the file's size: the write fails in the middle of the data."""
    save_safetensors({"w": torch.ones(3)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="x'"):
            save_safetensors({"w": torch.zeros(1 << 20)}, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == before


def test_a_missing_folder_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        save_safetensors({"w": torch.ones(3)}, tmp_path / "absent" / "x")
