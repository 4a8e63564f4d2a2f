"""Packed files that are damaged: an error that says so, and never other weights."""

import hashlib
import json
import random

import pytest
import torch

import s3lab as s3
from s3lab.packing.codec import pack
from s3lab.packing.file import SEAL, TEXT, VERSION, Entry, Header, read_header, read_packed, seal, write_tensors
from s3lab.tensors.wraps import Wraps

SHAPE = (16, 64)


def prune(spec, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(shape, dict):
        masks = spec.bind(shape).project({name: torch.rand(own, generator=generator) for name, own in shape.items()})
        return {name: torch.randn(own, generator=generator).where(masks[name], 0) for name, own in shape.items()}
    mask = spec.bind(shape).project(torch.rand(shape, generator=generator))
    return torch.randn(shape, generator=generator).bfloat16().where(mask, 0)


def make_entries():
    """A packed weight of each kind of index, one with rounded values, and a coupling."""
    texts = ["2:4", "25%", "2:4 each way", "4:8@4x1 then 2:4", "8:16 plus 1:32"]
    entries = [Entry(pack(prune(s3.parse(text), SHAPE), text), {"": f"layers.{n}"}) for n, text in enumerate(texts)]
    entries.append(Entry(pack(prune(s3.parse("8:16"), SHAPE), "8:16", values="int4", group=16), {"": "layers.8"}))
    generator = torch.Generator().manual_seed(9)
    wraps = Wraps(*(torch.randn(n, 8, 8, generator=generator).bfloat16() for n in (2, 8)))
    entries.append(Entry(pack(prune(s3.parse("2:4"), SHAPE), "2:4"), {"": "layers.7"}, frozenset(), wraps))
    pair = s3.parse("down: (M,1) & up: (1,K) follows keep 50%")
    weights = prune(pair, {"down": (8, 16), "up": (16, 8)})
    return [*entries, Entry(pack(weights, pair), {"down": "layers.9.down", "up": "layers.9.up"})]


def write(folder, entries, **others):
    tensors = {name: tensor for entry in entries for name, tensor in entry.tensors().items()} | others
    write_tensors(tensors, seal([entry.describe() for entry in entries], tensors).write(), folder)
    return folder / "model.safetensors"


def read_all(path):
    entries, dense = read_packed(path)
    return dense | {name: W for entry in entries for name, W in entry.unpack().items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    entries = make_entries()
    path = write(tmp_path_factory.mktemp("file"), entries, norm=torch.arange(8.0))
    return path.read_bytes(), {name: W for entry in entries for name, W in entry.unpack().items()}


def damage(data, chance):
    """One change to a file: a bit, some bytes, an end that is missing or too much, a piece moved or doubled."""
    data, at = bytearray(data), chance.randrange(len(data))
    if chance.random() < 0.5:
        at = chance.randrange(min(len(data), 4096))  # half of them in the header
    size = chance.choice([1, 2, 8, 64])
    match chance.randrange(6):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + size] = chance.randbytes(len(data[at : at + size]))
        case 2:
            del data[at:]
        case 3:
            data[at:at] = chance.randbytes(size)
        case 4:
            del data[at : at + size]
        case 5:
            other = chance.randrange(len(data))
            data[at : at + size] = data[other : other + size]
    return bytes(data)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_an_error_or_holds_the_same_weights(count, stored, tmp_path):
    data, weights = stored
    chance, refused = random.Random(count), 0
    path = tmp_path / "model.safetensors"
    for _ in range(count):
        path.write_bytes(damage(data, chance))
        try:
            found = read_all(path)
        except s3.DataError:
            refused += 1
        else:  # a change that changes nothing, such as a byte to itself
            assert found.keys() - {"norm"} == weights.keys() and torch.equal(found["norm"], torch.arange(8.0))
            assert all(torch.equal(found[name], W) for name, W in weights.items())
    assert refused > 0.9 * count


def test_what_is_written_is_read_back(stored, tmp_path):
    data, weights = stored
    (tmp_path / "model.safetensors").write_bytes(data)
    found = read_all(tmp_path)
    assert found.keys() == weights.keys() | {"norm"} and all(torch.equal(found[name], W) for name, W in weights.items())


def cut_blocks(told, tensors, block):
    told["wrap"] = block
    for side, size in (("left", 16), ("right", 64)):
        tensors[f"layers.7.{side}"] = torch.ones(size // block, block, block).bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told, t: t.__setitem__("layers.0.index", t["layers.0.index"][:-1]), "the index ends after"),
        (lambda told, t: t.__setitem__("layers.0.index", t["layers.0.index"].repeat(2)), "the index has"),
        (lambda told, t: t.__setitem__("layers.0.index", t["layers.0.index"] | 255), "names no choice of blocks"),
        (lambda told, t: t.__setitem__("layers.1.index", t["layers.1.index"].flip(0)), "no code|ends after|keeps"),
        (lambda told, t: t.__setitem__("layers.2.index", t["layers.2.index"] | 255), "names no square"),
        (lambda told, t: t.__setitem__("layers.0.values", t["layers.0.values"][1:]), "pack the model again"),
        (lambda told, t: t.__setitem__("layers.0.values", t["layers.0.values"].float()), "was packed"),
        (lambda told, t: t.__setitem__("layers.8.scales", t["layers.8.scales"][1:]), "scales"),
        (lambda told, t: t.__setitem__("layers.7.left", t["layers.7.left"][1:]), "layers.7.left is"),
        (lambda told, t: t.__setitem__("layers.7.right", t["layers.7.right"].float()), "layers.7.right is"),
        (lambda told, t: told[6].__setitem__("wrap", 4), "layers.7.left is"),
        (lambda told, t: told[6].__setitem__("wrap", -8), "layers.7.left is"),
        (lambda told, t: told[7].__setitem__("wrap", 8), "tells of no"),
        (lambda told, t: cut_blocks(told[6], t, 6), "layers.7.left is"),  # of which two do not fill 16 rows
        (lambda told, t: t.pop("layers.7.left"), "tells of no layers.7.left"),
        (lambda told, t: told[0].__setitem__("spec", "1:4"), "index"),
        (lambda told, t: told[0].__setitem__("spec", "2;4"), "not as s3lab writes it"),
        (lambda told, t: told[0].__setitem__("dtype", "float99"), "not as s3lab writes it"),
        (lambda told, t: told[0].__setitem__("names", {"": "layers.77"}), "layers.77"),
        (lambda told, t: told[0].pop("kept"), "not as s3lab writes it"),
    ],
)
def test_what_is_sealed_but_wrong_is_refused(change, message, tmp_path):
    entries = make_entries()
    tensors = {name: tensor for entry in entries for name, tensor in entry.tensors().items()}
    told = [entry.describe() for entry in entries]
    change(told, tensors)
    write_tensors(tensors, seal(told, tensors).write(), tmp_path)
    with pytest.raises(s3.DataError, match=message):
        read_all(tmp_path)


def test_an_unknown_version_is_named(tmp_path):
    metadata = Header([], {}).write()
    told = json.dumps({**json.loads(metadata[TEXT]), "version": VERSION + 1})
    other = Header([], {}).write() | {TEXT: told}
    with pytest.raises(s3.DataError, match="not as it was written"):
        read_header(other, tmp_path)
    other[SEAL] = hashlib.sha256(told.encode()).hexdigest()
    with pytest.raises(s3.DataError, match=f"version {VERSION + 1} of the layout and this s3lab reads 1 to {VERSION}"):
        read_header(other, tmp_path)


def test_files_from_before_there_were_wraps_are_read(tmp_path):
    entry = make_entries()[0]
    told, tensors = entry.describe(), entry.tensors()
    del told["wrap"]
    metadata = seal([told], tensors).write()
    text = json.dumps({**json.loads(metadata[TEXT]), "version": 1})
    write_tensors(tensors, {**metadata, TEXT: text, SEAL: hashlib.sha256(text.encode()).hexdigest()}, tmp_path)
    ((name, W),) = read_all(tmp_path).items()
    assert name == "layers.0.weight" and torch.equal(W, prune(s3.parse("2:4"), SHAPE))


def test_no_file_is_left_in_part(tmp_path, monkeypatch):
    entries = make_entries()[:1]
    path = write(tmp_path, entries)
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, make_entries())
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
