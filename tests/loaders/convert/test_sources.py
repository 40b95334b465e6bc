"""Where images come from: which files, in which order, with which labels. Contents are decoded in test_convert."""

import gzip
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from loaders.braces import expand_braces
from loaders.convert.sources import open_source
from loaders.errors import UserError


def jpeg(shade=0):
    out = io.BytesIO()
    Image.new("RGB", (9, 7), (shade % 256, 10, 200)).save(out, "JPEG")
    return out.getvalue()


def tree(folder, names):
    """Files with an image each, or the bytes given."""
    contents = dict(names) if isinstance(names, dict) else {name: jpeg(i) for i, name in enumerate(names)}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def tar_bytes(contents, mode="w", **options):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_bytes(contents, method):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return out.getvalue()


def listing(source):
    return {source.name(i): source.read(i) for i in range(len(source))}


CLASSES = ["dog/b.jpg", "cat/a.jpg", "cat/deep/c.jpg", "dog/d.jpg"]
PACKERS = {
    "folder": None,
    "tar": tar_bytes,
    "tar-gnu": lambda c: tar_bytes(c, format=tarfile.GNU_FORMAT),
    "tar.gz": lambda c: tar_bytes(c, "w:gz"),
    "tar.bz2": lambda c: tar_bytes(c, "w:bz2"),
    "tar.xz": lambda c: tar_bytes(c, "w:xz"),
    "zip": lambda c: zip_bytes(c, zipfile.ZIP_STORED),
    "zip-deflated": lambda c: zip_bytes(c, zipfile.ZIP_DEFLATED),
    "zip-bzip2": lambda c: zip_bytes(c, zipfile.ZIP_BZIP2),
}


@pytest.fixture(params=PACKERS)
def pack(request, tmp_path):
    """A function that makes a source of {name: content}, in each form; what it is called does not matter."""

    def make(contents):
        if PACKERS[request.param] is None:
            tree(tmp_path / "src", contents)
        else:
            (tmp_path / "src").write_bytes(PACKERS[request.param](contents))
        return str(tmp_path / "src")

    return make


def test_class_folders(pack):
    contents = {name: jpeg(i) for i, name in enumerate(CLASSES)}
    source = open_source(pack(contents))
    assert source.classes == ["cat", "dog"]
    assert listing(source) == {name: (content, int(name.startswith("dog"))) for name, content in contents.items()}
    assert list(source.sizes) == [len(source.read(i)[0]) for i in range(4)]


def test_any_order_and_into_a_buffer(pack):
    """What is read is the same in any order, and in memory of the caller's where that suits."""
    contents = {f"c/{i}.jpg": jpeg(i) + bytes(i) for i in range(12)}
    source = open_source(pack(contents))
    in_order = [source.read(i) for i in range(12)]
    for size in (0, len(in_order[5][0]), 1 << 20):
        buffer = memoryview(bytearray(size))
        for i in (5, 11, 0, 3, 10):
            content, label = source.read(i, buffer)
            assert (bytes(content), label) == in_order[i]
            if isinstance(content, memoryview):
                assert content.obj is buffer.obj and content == buffer[: len(content)]


def test_a_file_that_changes_after_listing(tmp_path):
    tree(tmp_path, {"grows.jpg": jpeg(), "shrinks.jpg": jpeg() + bytes(100)})
    source = open_source(str(tmp_path))
    tree(tmp_path, {"grows.jpg": jpeg() + bytes(5000), "shrinks.jpg": jpeg()})
    for buffer in (None, memoryview(bytearray(1 << 20))):
        assert [bytes(source.read(i, buffer)[0]) for i in range(2)] == [jpeg() + bytes(5000), jpeg()]


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_compressed_tar_is_unpacked_out_of_sight(tmp_path, kind):
    contents = {name: jpeg(i) for i, name in enumerate(CLASSES)}
    (tmp_path / "x").write_bytes(PACKERS[kind](contents))
    (tmp_path / "scratch").mkdir()
    source = open_source(str(tmp_path / "x"), scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    descriptors = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)}
    assert any(path.startswith(str(tmp_path / "scratch")) for path in descriptors)
    assert listing(source).keys() == contents.keys()
    source.close()


IN_CLASSES = dict.fromkeys(CLASSES, jpeg())
JUNK = dict.fromkeys((".DS_Store", "cat/._a.jpg", "__MACOSX/cat/a.jpg", ".git/a.jpg"), b"x")
OTHERS = {"README.md": b"text", "cat/notes.txt": b"long enough to be sniffed at", "dog/empty.txt": b""}


@pytest.mark.parametrize(
    ("contents", "num", "classes", "ignored", "unusable"),
    [
        ({"a.jpg": jpeg(), "b.png": jpeg(1)}, 2, [], 0, []),
        (JUNK | IN_CLASSES | OTHERS, 4, ["cat", "dog"], 3, []),
        ({"cat/a.jpg": jpeg(), "cat/0123abcd": jpeg(1), "dog/x.dat": jpeg(2)}, 3, ["cat", "dog"], 0, []),
        ({f"./top/images/{name}": jpeg() for name in CLASSES}, 4, ["cat", "dog"], 0, []),
        ({"logo.jpg": jpeg()} | IN_CLASSES, 4, ["cat", "dog"], 0, ["logo.jpg"]),
        # one class called train (as in CIFAR-100) is a class
        ({"train/a.jpg": jpeg(), "ship/b.jpg": jpeg()}, 2, ["ship", "train"], 0, []),
    ],
    ids=["flat", "hidden and other files", "by another name", "a top folder", "beside the classes", "a class train"],
)
def test_which_files_and_classes(pack, contents, num, classes, ignored, unusable):
    source = open_source(pack(contents))
    assert (len(source), source.classes, source.ignored) == (num, classes, ignored)
    assert source.unusable == [(name, "lies beside the class folders, so it has no class") for name in unusable]
    assert not listing(source).keys() & {*JUNK, *OTHERS, *unusable}
    assert {label for _, label in listing(source).values()} == set(range(len(classes) or 1))


def test_train_and_val_must_be_chosen(pack):
    path = pack({f"set/{split}/{name}": jpeg(len(split)) for split in ("train", "val") for name in CLASSES})
    with pytest.raises(UserError, match=r"train and val.*--subdir train"):
        open_source(path)
    for subdir in ("val", "set/val", "val/"):
        source = open_source(path, subdir=subdir)
        assert source.classes == ["cat", "dog"] and len(source) == 4
        assert {content for content, _ in listing(source).values()} == {jpeg(3)}
    with pytest.raises(UserError, match=r"no folder 'test'.*train, val"):
        open_source(path, subdir="test")


def test_nothing_to_convert(pack):
    with pytest.raises(UserError, match="holds no images"):
        open_source(pack({"README.md": b"text", "data.csv": b"1,2"}))


def test_no_source(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"this is not an archive" * 100)
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "missing": "does not exist",
        "empty.tar": "is empty",
        "text.tar": "no archive",
        "zeros.tar": "without files",
        "pipe": "neither a file nor a folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            open_source(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
    tree(tmp_path / "archives", {"train.tar": tar_bytes({"a.jpg": jpeg()})})
    with pytest.raises(UserError, match="holds archives"):
        open_source(str(tmp_path / "archives"))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "zip"])
def test_truncated_archive(tmp_path, kind):
    rng = np.random.default_rng(0)
    content = PACKERS[kind]({f"cat/{i}.jpg": rng.bytes(20_000) for i in range(5)})
    path = tmp_path / "x"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_source(str(path))


def test_damage_inside_a_zip_is_an_error_of_that_file(tmp_path):
    content = bytearray(zip_bytes({"a.jpg": jpeg(), "b.jpg": jpeg(1)}, zipfile.ZIP_DEFLATED))
    content[60] ^= 0xFF
    (tmp_path / "x.zip").write_bytes(content)
    source = open_source(str(tmp_path / "x.zip"))
    with pytest.raises(OSError, match="damaged in the archive"):
        source.read(0)
    assert source.read(1) == (jpeg(1), 0)


def test_long_and_odd_names_in_a_tar(tmp_path):
    names = ["c" * 120 + "/" + "n" * 180 + ".jpg", "ünï/ço dé.jpg"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        (tmp_path / "x.tar").write_bytes(tar_bytes({name: jpeg() for name in names}, format=form))
        assert listing(open_source(str(tmp_path / "x.tar"))).keys() == set(names)


def test_links_in_a_folder(tmp_path):
    tree(tmp_path / "elsewhere", ["a.jpg"])
    tree(tmp_path / "src", ["cat/b.jpg"])
    (tmp_path / "src" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "cat" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "cat" / "gone.jpg").symlink_to(tmp_path / "nothing")
    source = open_source(str(tmp_path / "src"))
    assert [source.name(i) for i in range(len(source))] == ["cat/b.jpg", "cat/gone.jpg", "dog/a.jpg"]
    with pytest.raises(FileNotFoundError):
        source.read(1)


# ImageNet as published

WNIDS = ["n02000003", "n01000001", "n03000002"]  # in the order of ILSVRC2012_ID


@pytest.fixture
def imagenet(tmp_path):
    """A small copy of the three archives, each built like the real one."""
    inner = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{k}.JPEG": jpeg(16 * i + k) for k in range(2)})
        for i, wnid in enumerate(sorted(WNIDS))
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    val = {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(100 + k) for k in (2, 1, 4, 3)}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))

    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object), ("num_children", object)]
    kind += [("children", object), ("wordnet_height", object), ("num_train_images", object)]
    synsets = np.zeros((4, 1), kind)
    for i, wnid in enumerate(WNIDS):
        synsets[i, 0] = (i + 1, wnid, f"words {i}", "gloss", 0, np.zeros((1, 0)), 0, 1300)
    synsets[3, 0] = (4, "n00000004", "a group", "gloss", 3, np.array([1, 2, 3]), 2, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    kit = {"readme.txt": b"", "data/meta.mat": meta.getvalue()}
    kit["data/ILSVRC2012_validation_ground_truth.txt"] = b"3\n1\n2\n1\n"
    kit = {f"ILSVRC2012_devkit_t12/{name}": content for name, content in kit.items()}
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(kit, "w:gz"))
    return tmp_path


def test_imagenet_train(imagenet):
    source = open_source(str(imagenet / "ILSVRC2012_img_train.tar"))
    assert source.classes == sorted(WNIDS)
    assert listing(source) == {
        f"{wnid}/{wnid}_{k}.JPEG": (jpeg(16 * i + k), i) for i, wnid in enumerate(sorted(WNIDS)) for k in range(2)
    }


def test_tar_of_tars_compressed(tmp_path):
    inner = {f"{name}.tar": tar_bytes({"x.jpg": jpeg(i)}) for i, name in enumerate("ba")}
    (tmp_path / "x.tgz").write_bytes(gzip.compress(tar_bytes(inner)))
    source = open_source(str(tmp_path / "x.tgz"))
    assert listing(source) == {"b/x.jpg": (jpeg(0), 1), "a/x.jpg": (jpeg(1), 0)}


VAL_LABELS = {1: 2, 2: 1, 3: 0, 4: 1}  # image -> position of WNIDS[truth - 1] among the sorted


def test_imagenet_val_takes_labels_from_the_kit_beside(imagenet):
    source = open_source(str(imagenet / "ILSVRC2012_img_val.tar"))
    assert source.classes == sorted(WNIDS)
    want = {f"ILSVRC2012_val_{k:08d}.JPEG": (jpeg(100 + k), label) for k, label in VAL_LABELS.items()}
    assert listing(source) == want


@pytest.mark.parametrize("unpacked", [False, True])
def test_imagenet_val_with_devkit_elsewhere(imagenet, unpacked):
    kit = imagenet / "ILSVRC2012_devkit_t12.tar.gz"
    (imagenet / "kits").mkdir()
    if unpacked:
        with tarfile.open(kit) as tar:
            tar.extractall(imagenet / "kits", filter="data")
        elsewhere = imagenet / "kits" / "ILSVRC2012_devkit_t12"
        kit.unlink()
    else:
        elsewhere = kit.rename(imagenet / "kits" / "kit.tar.gz")
    with pytest.raises(UserError, match="--devkit"):
        open_source(str(imagenet / "ILSVRC2012_img_val.tar"))
    source = open_source(str(imagenet / "ILSVRC2012_img_val.tar"), devkit=elsewhere)
    assert sorted(label for _, label in listing(source).values()) == sorted(VAL_LABELS.values())


def test_imagenet_val_with_a_kit_that_does_not_fit(imagenet):
    val, kit = str(imagenet / "ILSVRC2012_img_val.tar"), imagenet / "ILSVRC2012_devkit_t12.tar.gz"
    for content, message in {
        b"not a tar": "cannot be read",
        tar_bytes({"data/other.txt": b""}): "has no ILSVRC2012_validation_ground_truth.txt",
        tar_bytes({"ILSVRC2012_validation_ground_truth.txt": b"1\n", "meta.mat": b"?"}): "meta.mat",
    }.items():
        kit.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_source(val)


# WebDataset


def test_webdataset_shards(tmp_path):
    for shard in range(3):
        contents = {}
        for k in range(2):
            contents[f"{shard}{k}.jpg"] = jpeg(10 * shard + k)
            contents[f"{shard}{k}.cls"] = f"{shard + 4}\n".encode()
        (tmp_path / f"train-{shard:03d}.tar").write_bytes(tar_bytes(contents))
    source = open_source(str(tmp_path / "train-{000..002}.tar"))
    assert source.classes == [str(i) for i in range(7)]
    assert listing(source) == {
        f"train-{s:03d}.tar/{s}{k}.jpg": (jpeg(10 * s + k), s + 4) for s in range(3) for k in range(2)
    }
    with pytest.raises(UserError, match=r"2 of 5 shards .* missing: train-003.tar, train-004.tar"):
        open_source(str(tmp_path / "train-{000..004}.tar"))


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_webdataset_single_shard_with_names_and_gaps(tmp_path, kind):
    contents = {"a/x.cls": b"dog", "a/x.seg.png": jpeg(), "b/x.jpeg": jpeg(1), "b/x.cls": b"cat", "c.webp": jpeg(2)}
    (tmp_path / "x").write_bytes(PACKERS[kind](contents))
    source = open_source(str(tmp_path / "x"))
    assert source.classes == ["cat", "dog"]
    assert listing(source) == {"a/x.seg.png": (jpeg(), 1), "b/x.jpeg": (jpeg(1), 0)}
    assert source.unusable == [("c.webp", "has no .cls beside it")]


def test_cls_files_of_something_else(tmp_path):
    tree(tmp_path, {"cat/a.jpg": jpeg(), "dog/b.jpg": jpeg(), "paper/thesis.cls": b"\\ProvidesClass{thesis}"})
    source = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog"] and source.ignored == 1


def test_braces(tmp_path):
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    (tmp_path / "odd{1..2}").mkdir()
    assert expand_braces(str(tmp_path / "odd{1..2}")) == [str(tmp_path / "odd{1..2}")]
    with pytest.raises(UserError, match="range"):
        expand_braces("a-{3..1}.tar")


# Generated and torchvision


def test_shapes():
    source = open_source("shapes:5", seed=3)
    from loaders.convert import shapes

    assert len(source) == 5 and source.classes == list(shapes.CLASSES)
    assert source.read(4) == shapes.render(4, seed=3, split="train")
    assert open_source("shapes-val:1", seed=3).read(0) == shapes.render(0, seed=3, split="val")
    assert len(open_source("shapes-val")) == shapes.DEFAULT_NUM["val"]
    for wrong in ("shapes:x", "shapes:0", "shapes:-1", "shapes:1:2"):
        with pytest.raises(UserError, match="shapes:5000"):
            open_source(wrong)


class Arrays:
    """Built like torchvision.datasets.CIFAR10: pixels in memory."""

    classes = ["odd", "even"]
    fetched = None

    def __init__(self, root, train=True, download=False):
        if not download and Arrays.fetched != root:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        Arrays.fetched = root
        self.train = train

    def __len__(self):
        return 3 if self.train else 2

    def __getitem__(self, i):
        return Image.new("RGB", (4, 3), (i, 0, 0)), i % 2


class Files:
    """Built like torchvision.datasets.Food101: image files and labels in lists."""

    def __init__(self, root, split="train", download=False):
        del download
        if split not in ("train", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {{'train', 'test'}}.")
        self._image_files = sorted((root / split).iterdir())
        self._labels = [5 - i for i in range(len(self._image_files))]
        self.classes = [("first", "synonym"), "b", "c", "d", "e", "f"]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, i):
        return Image.open(self._image_files[i]).convert("RGB"), self._labels[i]


class Boxes(Files):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], {"boxes": []}


class Offline:
    def __init__(self, root, train=True, download=False):
        raise OSError("<urlopen error\n no route to host>") if download else RuntimeError(f"not in {root} {train}")


@pytest.fixture
def torchvision_sets(monkeypatch):
    from torchvision import datasets

    for one in (Arrays, Files, Boxes, Offline):
        monkeypatch.setattr(datasets, one.__name__, one, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Arrays", "Files", "Boxes", "Offline"))


@pytest.mark.usefixtures("torchvision_sets")
def test_torchvision_pixels(tmp_path):
    source = open_source("torchvision:arrays", root=tmp_path / "cache")  # not there: fetched
    assert len(source) == 3 and source.classes == ["odd", "even"] and source.name(2) == "torchvision:arrays 2"
    image, label = source.read(1)
    assert label == 1 and np.asarray(image)[0, 0].tolist() == [1, 0, 0]
    assert len(open_source("torchvision:Arrays:test", root=tmp_path / "cache")) == 2
    with pytest.raises(UserError, match="train and test, not 'dev'"):
        open_source("torchvision:Arrays:dev", root=tmp_path)


@pytest.mark.usefixtures("torchvision_sets")
def test_torchvision_files_keep_their_bytes(tmp_path):
    contents = tree(tmp_path, ["test/a.jpg", "test/b.jpg"])
    source = open_source("torchvision:Files:test", root=tmp_path)
    assert [source.read(i) for i in range(2)] == [(contents["test/a.jpg"], 5), (contents["test/b.jpg"], 4)]
    assert source.classes[:2] == ["first", "b"] and source.name(0) == str(tmp_path / "test" / "a.jpg")
    with pytest.raises(UserError, match="Unknown value 'dev'"):
        open_source("torchvision:Files:dev", root=tmp_path)
    with pytest.raises(UserError, match="not a classification set"):
        open_source("torchvision:Boxes:test", root=tmp_path)


@pytest.mark.usefixtures("torchvision_sets")
def test_torchvision_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match=r"could not be fetched \(<urlopen error no route to host>\)"):
        open_source("torchvision:Offline", root=tmp_path)
    with pytest.raises(UserError, match="did you mean CIFAR10"):
        open_source("torchvision:cifra10", root=tmp_path)
    with pytest.raises(UserError, match=r"known: .*CIFAR100.*Food101"):
        open_source("torchvision:", root=tmp_path)


def test_classes_of_torchvision_are_known_by_name():
    from loaders.convert import torchvision_sets

    for name in ("CIFAR10", "mnist", "SVHN", "stl10", "Food101", "Imagenette", "ImageNet", "DTD"):
        assert torchvision_sets.find(name, "").lower() == name.lower()
    for name in ("ImageFolder", "FakeData", "VisionDataset"):
        with pytest.raises(UserError):
            torchvision_sets.find(name, "")


def test_imagenette_of_torchvision_keeps_bytes(tmp_path):
    """A real class of torchvision on a hand-made copy of its folder."""
    folder = tmp_path / "imagenette2-160"
    contents = tree(folder, [f"{split}/{c}/x.JPEG" for split in ("train", "val") for c in ("n01440764", "n02102040")])
    from torchvision.datasets import Imagenette

    from loaders.convert import torchvision_sets

    data = Imagenette(tmp_path, split="val", size="160px")
    found = torchvision_sets.files_and_labels(data)
    assert [(open(p, "rb").read(), label) for p, label in found] == [  # noqa: SIM115
        (contents["val/n01440764/x.JPEG"], 0),
        (contents["val/n02102040/x.JPEG"], 1),
    ]
    assert torchvision_sets.classes(data) == ["tench", "English springer"]


def test_subset_is_spread_over_the_source(tmp_path):
    tree(tmp_path, [f"{c}/{k}.jpg" for c in "abcd" for k in range(10)])
    source = open_source(str(tmp_path))
    chosen = source.subset(8)
    assert [source.read(int(i))[1] for i in chosen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(source.subset(1000)) == 40
    assert list(open_source("shapes:50").subset(7)) == list(range(7))
