"""A run as a page: what it keeps for that, what is drawn, and what is said where it cannot be."""

import base64
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import empssl
from empssl import main
from empssl_support import files, report
from empssl_support import report_pictures as pictures
from empssl_support import report_sections as sections
from empssl_support.cli import UsageError
from recipes import SHAPES, TINY, plain_folder

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("bokeh")
pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")

PARTS = ["figures", "neighbours", "map", "odd", "duplicates", "patches", "curves"]
DEMO = Path("runs/demo")


def page(run=DEMO):
    return (run / "report.html").read_text()


def parts(text):
    return re.findall(r'<section id="(\w+)">', text)


def part(text, name):
    return re.search(rf'<section id="{name}">.*?</section>', text, re.S).group(0)


def pictures_in(text):
    """The address and the words of each picture."""
    return re.findall(r'<img src="([^"]+)" alt="([^"]*)"', text)


def of_plain_images(folder, *flags):
    return main(["--dataset", "imagefolder", "--data-dir", folder, *TINY, *flags, "--name", "demo"])


def refused(arguments, capsys):
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    return sentence


# ---- the page that a run leaves ----


def test_a_run_leaves_its_page(capsys):
    record = main([*SHAPES, "--epochs", "2", "--name", "demo"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("drawn: runs/demo/report.html")
    text = page()
    assert parts(text) == PARTS
    assert "360 small patches of 60 images of shapes" in text
    for key in ("linear_top1", "quadrants_top1", "knn_top1"):
        assert f"{100 * record[key]:.1f} %" in part(text, "figures")
    for key in ("untrained_knn_top1", "raw_pixels_knn_top1"):
        assert f"<td>{100 * record[key]:.1f} %</td>" in part(text, "figures")
    assert part(text, "curves").count('<svg role="img" aria-label="') == 4
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_nothing_of_the_page_is_fetched():
    main([*SHAPES, "--name", "demo"])
    text = page()
    assert not re.findall("<script[^>]* src", text)
    text = re.sub("<script.*?</script>", "", text, flags=re.S)
    assert not re.findall(r"""(?:src|href)=["']?(?!["']?(?:data:|#))""", text)
    assert not re.findall(r"<link|@import|url\((?!#)", text)
    addresses = pictures_in(text)
    assert len(addresses) > 12 * 17
    for address, words in addresses:
        assert words
        file = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
        with Image.open(io.BytesIO(file)) as picture:
            assert picture.format == "WEBP" and max(picture.size) <= 64


def test_what_is_kept_is_of_the_test_images_after_training_and_before():
    main([*SHAPES, "--name", "demo"])
    kept = np.load("runs/demo/report.npz")
    data = empssl.load_dataset("shapes", subset=60)
    config = empssl.Config(**json.loads((DEMO / "config.json").read_text(), object_hook=of_config))
    before = empssl.untrained_encoder(config, data.train_images)
    after = empssl.load("runs/demo/encoder.pt")
    for name, encoder in (("features", after), ("untrained", before)):
        h = empssl.embed(encoder, data.test_images, 4)
        assert kept[name].dtype == np.float16
        np.testing.assert_allclose(kept[name], h, atol=2e-3, rtol=2e-3)
    assert np.array_equal(kept["labels"], data.test_labels)
    assert list(kept["classes"]) == data.classes
    first = Image.open(io.BytesIO(kept["thumbnails"][: kept["lengths"][0]].tobytes()))
    difference = np.asarray(first).transpose(2, 0, 1) - data.test_images[0].numpy().astype(int)
    assert np.abs(difference).mean() < 10


def of_config(stored):
    return {k: v for k, v in stored.items() if k in empssl.Config.__dataclass_fields__}


@pytest.mark.parametrize("flags,built", [([], 1), (["--eval-only"], 1)])
def test_the_untrained_encoder_is_embedded_once(flags, built, monkeypatch):
    calls = []
    untrained = empssl.untrained_encoder

    def counted(*arguments):
        calls.append(1)
        return untrained(*arguments)

    monkeypatch.setattr(empssl, "untrained_encoder", counted)
    main([*SHAPES, "--name", "demo", *flags])
    assert len(calls) == built
    rows = part(page(), "neighbours")
    assert rows.count("<span>after training") == 12
    # What is itself untrained has no earlier self to compare with.
    assert ("untrained" in np.load("runs/demo/report.npz")) == (flags == [])
    assert rows.count("<span>before") == (12 if flags == [] else 0)


def test_neighbours_are_the_nearest_of_all():
    main([*SHAPES, "--name", "demo"])
    shown = report.read_kept(DEMO, "data")
    queries = part(page(), "neighbours").split('<div class="query">')[1:]
    assert len(queries) == 12
    with np.load("runs/demo/report.npz") as kept:
        both = [torch.tensor(kept[name]).double() for name in ("features", "untrained")]
    for query in queries:
        sources = [address for address, _ in pictures_in(query)]
        i = shown.thumbnails.index(sources[0])
        for h, found in zip(both, (sources[1:9], sources[9:]), strict=True):
            cosine = F.cosine_similarity(h, h[i : i + 1])
            cosine[i] = -1
            order = cosine.argsort(descending=True)[:8]
            assert found == [shown.thumbnails[j] for j in order]
        frames = re.findall(r'class="(same|other)"', query)
        names = [words for _, words in pictures_in(query)]
        assert frames == ["same" if name == names[0] else "other" for name in names[1:]]


def test_images_without_labels(in_tmp):
    plain_folder(in_tmp / "plain")
    (in_tmp / "plain" / "00.png").rename(in_tmp / "plain" / "a <b>&.png")
    copy = in_tmp / "plain" / os.fsdecode(b"copy\xff.png")
    copy.write_bytes((in_tmp / "plain" / "07.png").read_bytes())
    of_plain_images("plain")
    text = page()
    assert parts(text) == PARTS and "of the folder plain" in text
    assert part(text, "curves").count("<svg") == 3
    rows = part(text, "neighbours")
    assert rows.count("after training") == 12 and "same" not in re.findall('class="(.*?)"', rows)
    assert "07.png and copy?.png, 1.000" in part(text, "duplicates")
    assert "<b>&.png" not in text and "a &lt;b&gt;&amp;.png" in text
    # All images' features are still kept beside.
    assert np.load("runs/demo/features.npz")["train_features"].shape == (31, 16)


def test_of_many_images_some_are_shown(in_tmp, monkeypatch):
    some = torch.tensor([2, 3, 11, 28])
    monkeypatch.setattr(empssl, "shown_in_report", lambda N, config: some)
    plain_folder(in_tmp / "plain")
    seen = []
    before = empssl.bag_to_probe

    def watched(encoder, images, config):
        seen.append(len(images))
        return before(encoder, images, config)

    monkeypatch.setattr(empssl, "bag_to_probe", watched)
    of_plain_images("plain")
    kept, whole = np.load("runs/demo/report.npz"), np.load("runs/demo/features.npz")
    # Trained features of all images, untrained ones of those that are shown alone.
    assert seen == [30, 4]
    assert np.array_equal(kept["features"], whole["train_features"][some])
    assert [name[-6:] for name in kept["files"]] == ["02.png", "03.png", "11.png", "28.png"]
    assert kept["untrained"].shape == (4, 16) and "training images" in page()


@pytest.mark.parametrize("N,hidden,count", [(50, 1024, 50), (9999, 1024, 3000), (9999, 4096, 1464)])
def test_which_are_shown(N, hidden, count):
    rows = empssl.shown_in_report(N, empssl.Config(hidden=hidden))
    assert len(rows) == count and len(rows.unique()) == count and 0 <= rows[0] < rows[-1] < N
    assert count == N or rows[-1] > count  # not the first ones


def test_two_images(in_tmp):
    plain_folder(in_tmp / "plain", count=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        of_plain_images("plain", "--batch", "2")
    assert parts(page()) == PARTS
    assert "2 training images" in page()


def test_names_that_are_no_text(in_tmp):
    odd = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        for name in (odd, "other"):
            plain_folder(in_tmp / odd / split / name, count=10)
    of_plain_images(odd)
    assert "caf?" in page()


def test_scores_without_labels_where_a_run_has_them():
    main([*SHAPES, "--name", "demo"])
    *others, last = [json.loads(line) for line in (DEMO / "metrics.jsonl").open()]
    last |= {"effective_rank": 41.26, "untrained_effective_rank": 7.5, "neighbours_kept": 0.625}
    lines = [*others, {"step": 3, "effective_rank": 30.0}, last]
    (DEMO / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(DEMO)
    told = part(page(), "figures")
    assert "Effective rank 41.3" in told and "untrained: 7.5" in told
    assert "Neighbours kept 62.5 %" in told
    assert part(page(), "curves").count("<svg") == 4


@pytest.mark.parametrize(
    "trained,untrained,pixels,told",
    [(0.7, 0.3, 0.5, "beyond raw"), (0.4, 0.3, 0.5, "not yet enough"), (0.3, 0.3, 0.1, "nothing")],
)
def test_what_is_said_of_the_training(trained, untrained, pixels, told):
    record = {"knn_top1": trained, "untrained_knn_top1": untrained}
    assert told in sections.verdict(record | {"raw_pixels_knn_top1": pixels})
    assert sections.verdict(record) == ""


# ---- what is alike, and what fits ----


def some_rows(N=40, width=6):
    return report.unit_rows(np.random.default_rng(0).normal(size=(N, width)))


def test_pairs_that_are_almost_the_same():
    rows = some_rows()
    assert pictures.twins(rows) == []
    rows[31] = rows[5]
    rows[17] = report.unit_rows(rows[5:6] + [[0.02, 0, 0, 0, 0, 0]])[0]
    pairs = pictures.twins(rows)
    assert [pair[:2] for pair in pairs] == [(5, 31), (5, 17), (17, 31)]
    for i, j, cosine in pairs:
        assert cosine == pytest.approx(rows[i] @ rows[j], abs=1e-6)


@pytest.mark.parametrize("N", [2, 5, 8])
def test_no_image_is_its_own_neighbour(N):
    order, cosine = pictures.nearest(some_rows(N), 8)
    assert [sorted(row) for row in order] == [[j for j in range(N) if j != i] for i in range(N)]
    assert np.isfinite(cosine).all()
    assert pictures.share_of_same_class(some_rows(N), np.arange(N)) == 0


def test_the_least_alike_come_first():
    rows = np.abs(some_rows(width=3))
    rows[23] = [-1, 0, 0]
    shown = pictures.Shown(rows, None, [str(i) for i in range(40)], None, [], ["x"] * 40)
    first, *_ = pictures_in(sections.odd_ones_out(shown))
    assert first[0] == "23"


def test_an_encoder_that_sees_all_alike_has_a_page(in_tmp):
    main([*SHAPES, "--name", "demo"])
    with np.load("runs/demo/report.npz") as kept:
        files.write_features(DEMO / "report.npz", **dict(kept) | {"features": np.ones((40, 16))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write(DEMO)
    assert "780 pairs" in part(page(), "duplicates") and "NaN" not in part(page(), "map")


def test_small_images_fit_a_page(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (20, 3, 100, 80), np.uint8)
    roomy = pictures.thumbnails(noise)
    assert Image.open(io.BytesIO(roomy[0])).size == (51, 64)
    monkeypatch.setattr(pictures, "BUDGET", sum(map(len, roomy)) // 3)
    tight = pictures.thumbnails(noise)
    assert len(tight) == 20 and sum(map(len, tight)) <= pictures.BUDGET


def test_the_largest_page_is_at_most_ten_megabytes(monkeypatch):
    main([*SHAPES, "--name", "demo"])
    chance = np.random.default_rng(0)
    thumbnails = chance.integers(0, 256, pictures.BUDGET, np.uint8)
    lengths = np.full(2500, pictures.BUDGET // 2500)
    features = chance.random((2500, 4), np.float32)
    arrays = {"thumbnails": thumbnails, "lengths": lengths, "features": features}
    arrays |= {"untrained": features, "files": [f"holiday/IMG_{i:06}.jpg" for i in range(2500)]}
    files.write_features(DEMO / "report.npz", **arrays)
    monkeypatch.setattr(pictures, "places", lambda features: features[:, :2])
    report.write(DEMO)
    assert 5e6 < (DEMO / "report.html").stat().st_size < 10e6


# ---- runs that have less ----


@pytest.mark.parametrize("damage", ["none kept", "cut short"])
def test_a_run_from_before_there_were_reports(damage):
    main([*SHAPES, "--name", "demo"])
    path = DEMO / "report.npz"
    path.write_bytes(path.read_bytes()[:3000])
    if damage == "none kept":
        path.unlink()
    report.write(DEMO)
    text = page()
    assert parts(text) == ["figures", "map", "patches", "curves"]
    assert text.count("report.npz") == 1 and "cannot be shown" in text
    assert "<span><i style=" in part(text, "map")  # the classes' colours

    (DEMO / "test_features.npz").unlink()
    (DEMO / "patches.npz").unlink()
    report.write(DEMO)
    assert parts(page()) == ["figures", "curves"] and "Bokeh" not in page()


def test_an_older_run_without_labels(in_tmp):
    plain_folder(in_tmp / "plain")
    of_plain_images("plain")
    (DEMO / "report.npz").unlink()
    report.write(DEMO)
    assert parts(page()) == ["figures", "map", "patches", "curves"] and "07.png" in page()


def test_a_run_that_was_stopped():
    main([*SHAPES, "--name", "demo"])
    for name in ("report.npz", "test_features.npz"):
        (DEMO / name).unlink()
    lines = (DEMO / "metrics.jsonl").read_text().splitlines()
    (DEMO / "metrics.jsonl").write_text(lines[0] + "\n")
    assert main(["--report", "runs/demo"]) == {}
    assert "has not come to its end: this is step 3" in page()
    assert parts(page()) == ["figures", "patches", "curves"]


def test_where_there_is_nothing_to_show(capsys):
    Path("runs/empty").mkdir(parents=True)
    for run in ("runs/empty", "runs/nothing"):
        assert run in refused(["--report", run], capsys)
    for text in ("{}", "[]", "no json"):
        (Path("runs/empty") / "config.json").write_text(text)
        (Path("runs/empty") / "metrics.jsonl").write_text('{"step": 1}\n')
        assert "runs/empty is no run's folder" in refused(["--report", "runs/empty"], capsys)


@pytest.mark.parametrize("lacking", ["matplotlib", "sklearn", "bokeh"])
def test_without_the_extra(lacking, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, lacking, None)
    record = main([*SHAPES, "--name", "demo"])
    assert "knn_top1" in record and not (DEMO / "report.html").exists()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("no report: ") and "pip install -e '.[figures]'" in last
    assert "pip install -e '.[figures]'" in refused(["--report", "runs/demo"], capsys)


def test_a_folder_that_may_not_be_written_to(monkeypatch, capsys):
    main([*SHAPES, "--name", "demo"])
    capsys.readouterr()
    before = page()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "replace", refuse)  # root may write whatever the mode is
    told = refused(["--report", "runs/demo"], capsys)
    assert "runs/demo/report.html cannot be read or written" in told
    assert page() == before and not list(DEMO.glob(".report*"))


def test_the_patches_that_are_kept_are_drawn_as_the_method_draws_them():
    main([*SHAPES, "--name", "demo"])
    saved = np.load("runs/demo/patches.npz")
    data = empssl.load_dataset("shapes", subset=60)
    some = torch.randperm(60, generator=empssl.generator_of(0, "report", 0))[:6]
    assert np.array_equal(saved["images"], data.train_images[some])
    config = empssl.Config(augmentation="light")
    augmentation = empssl.training_augmentation(config, (32, 32))
    chance = empssl.generator_of(0, "report", 1)
    params = empssl.sample_patches(6, 12, (32, 32), augmentation, chance)
    x = empssl.extract_patches(data.train_images, some, params, 16).view(12, 6, 3, 16, 16)
    assert np.abs(saved["patches"] / 127.5 - 1 - x.numpy()).max() < 1 / 127
    shown = pictures_in(part(page(), "patches"))
    assert len(shown) == 6 * 13 and shown[14][1] == "patch 1 of image 2"


def test_the_run_is_its_folders_name_wherever_it_is_named_from(monkeypatch):
    main([*SHAPES, "--name", "demo"])
    monkeypatch.chdir("runs/demo")
    main(["--report", "."])
    assert "<h1>demo</h1>" in Path("report.html").read_text()
    with pytest.raises(UsageError, match="no run's folder"):
        report.write(Path(".."))
