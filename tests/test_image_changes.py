"""A folder that changes: what is decoded again, and that the cache is never wrong."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from empssl_support import images
from empssl_support.cli import UsageError
from empssl_support.images import CACHE, decode_once, open_cache, walk
from recipes import picture
from test_images import brightness, decode

pytestmark = pytest.mark.usefixtures("in_tmp")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that have been decoded."""
    read, names = images.read_image, []

    def watched(file, size):
        names.append(file.name)
        return read(file, size)

    monkeypatch.setattr(images, "read_image", watched)
    return names


def test_of_many_files_the_changed_one_is_decoded_alone(in_tmp, decoded, capsys):
    root = in_tmp / "many"
    for i in range(1500):
        picture(root / f"{i:04}.png", i % 250, size=(3, 3))
    before, _ = decode(root)
    assert len(decoded) == 1500
    decoded.clear()
    picture(root / "1100.png", 255, size=(3, 3))
    after, _ = decode(root)
    assert decoded == ["1100.png"]
    assert brightness(after) == [255 if i == 1100 else i % 250 for i in range(1500)]
    assert brightness(before) == [i % 250 for i in range(1500)]  # still mapped, as it was
    assert len(list(CACHE.iterdir())) == 1
    assert "1,499 of them are copied" in capsys.readouterr().out


def test_two_files_of_one_size_and_date_that_change_places(folder, decoded):
    for name in ("1.png", "2.png"):
        picture(folder / name, 10 * int(name[0]), size=(4, 4))
        os.utime(folder / name, (1, 1))
    assert (folder / "1.png").stat().st_size == (folder / "2.png").stat().st_size
    decode(folder)
    decoded.clear()
    time.sleep(0.02)  # of some systems the clock goes in steps
    for old, new in (("1.png", "3.gif"), ("2.png", "1.png"), ("3.gif", "2.png")):
        (folder / old).rename(folder / new)
    assert brightness(decode(folder)[0]) == [0, 20, 10, 30, 40]
    assert sorted(decoded) == ["1.png", "2.png"]


def test_an_image_that_cannot_be_read_is_tried_again_when_it_changes(in_tmp, decoded, capsys):
    for i in range(150):
        picture(in_tmp / "many" / f"{i:03}.png", i, size=(4, 4))
    bad = in_tmp / "many" / "007.png"
    bad.write_bytes(b"not an image")
    decode(in_tmp / "many")
    decoded.clear()
    picture(in_tmp / "many" / "100.png", 222, size=(4, 4))
    capsys.readouterr()
    found, names = decode(in_tmp / "many")
    assert decoded == ["100.png"] and len(found) == 149 and bad.name not in names
    assert "1 of 150 images could not be read" in capsys.readouterr().out

    (in_tmp / "many" / "008.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UsageError, match="2 of 150 images cannot be read.*007.png"):
            decode(in_tmp / "many")
    picture(in_tmp / "many" / "008.png", 8, size=(4, 4))
    decoded.clear()
    picture(bad, 77, size=(4, 4))
    found, names = decode(in_tmp / "many")
    assert sorted(decoded) == ["007.png", "008.png"] and len(found) == 150
    assert brightness(found)[names.index("007.png")] == 77


# ---- any changes ----

NAMES = [f"{split}/{name}.png" for split in ("train", "test") for name in "abc"]
CHANGES = st.one_of(
    st.tuples(st.sampled_from(["write", "remove", "touch", "spoil"]), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.permutations(NAMES).map(lambda names: names[:2])),
)


class Files:
    """A folder with a train and a test split, and what has changed since it was decoded."""

    def __init__(self, root):
        shutil.rmtree(root, ignore_errors=True)
        self.root = root
        self.clock = 0
        self.changed = set()
        for name in ("train/z.png", *NAMES[::2]):
            self.apply("write", name)

    def apply(self, what, name):
        if what == "rename":
            return self.rename(*name)
        path = self.root / name
        if what in ("remove", "touch") and not path.exists():
            return None
        self.clock += 1
        self.changed.add(name)
        if what == "write":
            picture(path, self.clock % 250, size=(4, 4))
        elif what == "spoil":
            path.write_bytes(b"not an image")
        elif what == "remove":
            path.unlink()
            self.changed.remove(name)
        if path.exists():
            os.utime(path, (self.clock, self.clock))

    def rename(self, old, new):
        if (self.root / old).exists():
            (self.root / old).rename(self.root / new)
            self.changed.discard(old)
            self.changed.add(new)

    def decode(self):
        """All pixels and rows, or what is said where nothing of the test split can be read."""
        files = {part: walk(self.root / part) for part in ("train", "test")}
        try:
            splits, key = decode_once(self.root, files, 4)
        except UsageError as error:
            return str(error)
        rows = [split.rows for split in splits.values()]
        return key, rows, [x if x is None else x.tolist() for x, _ in splits.values()]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.lists(CHANGES, max_size=4), min_size=1, max_size=4))
def test_whatever_changes_it_is_as_if_decoded_afresh(rounds, in_tmp, decoded, monkeypatch):
    monkeypatch.setattr(images, "refuse_too_many", lambda *_: None)
    files = Files(in_tmp / "set")
    shutil.rmtree(CACHE, ignore_errors=True)
    for changes in [[], *rounds]:
        for change in changes:
            files.apply(*change)
        decoded.clear()
        updated = files.decode()
        assert sorted(decoded) == sorted(Path(name).name for name in files.changed)
        files.changed.clear()
        assert len(list(CACHE.iterdir())) == 1
        with monkeypatch.context() as patch:
            patch.setattr(images, "CACHE", in_tmp / "afresh")
            shutil.rmtree("afresh", ignore_errors=True)
            assert files.decode() == updated


# ---- kills, and other processes ----


def python(code):
    """Another process, which finds `images` and knows the tests' helpers."""
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    head = (
        "import os, signal\nfrom pathlib import Path\nfrom empssl_support import images\n"
        "from test_images import brightness, decode\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("moment", ["read_image", "write_text", "flush_folder"])
def test_a_kill_leaves_the_old_cache_or_the_new_one(moment, folder, decoded):
    decode(folder)
    (old,) = CACHE.iterdir()
    content = (old / "images.u8").read_bytes()
    picture(folder / "3.png", 99)
    kill = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    done = python(f"images.{moment} = {kill}\ndecode(Path('images'))")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (old / "images.u8").read_bytes() == content
    assert open_cache(old, 30)
    decoded.clear()
    assert brightness(decode(folder)[0]) == [0, 10, 20, 99, 40]
    assert decoded == ([] if moment == "flush_folder" else ["3.png"])
    left = [path.name for path in CACHE.iterdir() if not path.name.startswith(".decoding")]
    assert len(left) == 1 and left != [old.name]


def test_another_process_that_is_quicker_may_delete_the_old_cache(folder, monkeypatch):
    decode(folder)
    (old,) = CACHE.iterdir()
    picture(folder / "0.png", 99)
    read = images.read_image

    def overtaken(file, size):
        done = python("print(brightness(decode(Path('images'))[0]))")
        assert "[99, 10, 20, 30, 40]" in done.stdout, done.stderr
        assert not old.exists()
        return read(file, size)

    monkeypatch.setattr(images, "read_image", overtaken)
    assert brightness(decode(folder)[0]) == [99, 10, 20, 30, 40]
    assert len(list(CACHE.iterdir())) == 1
