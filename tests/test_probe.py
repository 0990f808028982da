"""Embedding and probes."""

import inspect
import itertools
import math
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

import empssl
import empssl_io as io
from empssl import (Augmentation, Encoder, K, Pointwise, embed, extract_patches, generator, grid_patches, knn_probe, linear_probe,
                    regions, sample_patches, whiten)


def blobs(N, classes=10, d=20, spread=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, d, generator=torch.Generator().manual_seed(99)), dim=1)
    y = torch.arange(N) % classes
    return centres[y] + spread * torch.randn(N, d, generator=g) / d ** 0.5, y


def test_separable_data_is_separated():
    train, test = blobs(500, seed=1), blobs(300, seed=2)
    top1, top5 = linear_probe(*train, *test)
    assert top1 > 0.97 and top5 >= top1
    assert knn_probe(*train, *test) > 0.97


def test_random_labels_give_chance():
    (x, _), (u, _) = blobs(500, spread=3, seed=1), blobs(2000, spread=3, seed=2)
    y, v = torch.randint(10, (500,)), torch.randint(10, (2000,))
    top1, top5 = linear_probe(x, y, u, v, epochs=20)
    assert 0.06 < top1 < 0.14 and 0.42 < top5 < 0.58
    assert 0.06 < knn_probe(x, y, u, v) < 0.14


def test_the_probe_follows_the_official_recipe(monkeypatch):
    """torch's own linear layer, cross-entropy, SGD and cosine, last partial batch included, give the same answers at the end."""
    (x, y), (u, v) = blobs(250, spread=2.5, seed=1), blobs(400, spread=2.5, seed=2)
    epochs, lr = 4, 0.5                                             # large, so that a weight decay of 5e-5 shows
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for index in torch.randperm(250, generator=generator(0, "probe", epoch)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[index]), y[index]).backward()
            optimizer.step()
        schedule.step()
    logits, products = layer(u), []
    monkeypatch.setattr(io, "sum_over_processes", lambda x: products.append(x) or x)
    top1, top5 = linear_probe(x, y, u, v, epochs=epochs, lr=lr)
    torch.testing.assert_close(products[-1].T, u @ layer.weight.T, rtol=1e-4, atol=1e-5)
    assert linear_probe(x, y, u, v, epochs=epochs, lr=lr) == (top1, top5)
    assert [inspect.signature(linear_probe).parameters[name].default for name in ("epochs", "batch", "lr")] == [100, 100, 0.03]
    assert 0.15 < top1 < 0.95
    assert top1 == pytest.approx((logits.argmax(1) == v).float().mean().item(), abs=0.0026)     # a tie may turn
    assert top5 == pytest.approx((logits.topk(5).indices == v[:, None]).any(1).float().mean().item(), abs=0.0026)


def test_knn_by_hand():
    """Two near votes for class 1 outweigh three far votes for class 0 by their exponential weights."""
    angle = torch.tensor([0.1, -0.1, 1.2, 1.3, -1.2])
    train = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    y = torch.tensor([1, 1, 0, 0, 0])
    query = torch.tensor([[5.0, 0.0]])
    assert knn_probe(train, y, query, torch.tensor([1])) == 1
    assert knn_probe(train, y, query, torch.tensor([0])) == 0
    assert knn_probe(train, y, query, torch.tensor([0]), temperature=1e3) == 1          # unweighted, three beat two
    assert knn_probe(train, y, query, torch.tensor([1]), k=2, temperature=1e3) == 1
    train[y == 0] *= 10                                             # by angle, however long
    assert knn_probe(train, y, query, torch.tensor([1])) == 1


def test_knn_weighs_twenty_neighbours_as_published():
    """Cosines of 1 once and 0.9 four times: exp(0.1 / T) is 4.2 at the official T of 0.07 and 3.8 at 0.075. Of the 21 nearest the last
    does not vote."""
    angle = torch.tensor([0.0] + [math.acos(0.9)] * 4)
    train, y = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([1, 0, 0, 0, 0])
    vote = lambda train, y, **how: knn_probe(train, y, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), **how)
    assert vote(train, y) == 1 and vote(train, y, temperature=0.075) == 0
    many = torch.tensor([[1.0, 0.0]] * 11 + [[0.99999, 0.00447]] * 11)
    y = torch.tensor([1] * 10 + [0] * 11)
    assert vote(many[1:], y) == 1 and vote(many[1:], y, k=21) == 0


def test_the_representations_own_figures_are_of_the_last_columns(monkeypatch):
    monkeypatch.setattr(empssl.io, "remembered", lambda *_: 0.5)
    (x, y), (u, v) = blobs(400, seed=1), blobs(300, seed=2)
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    data = empssl.io.Dataset(images, y, images[:300], v, list("abcdefghij"), "key")
    config = empssl.Config(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=8)
    noise, other = torch.randn(400, 8), torch.randn(300, 8)
    beside = empssl.probe([torch.cat([x, noise], 1), torch.cat([u, other], 1)], data, config, None)
    assert beside["linear_top1"] > 0.9 and beside["representation_top1"] < 0.3 and beside["knn_top1"] < 0.3
    config.hidden = 20
    alone = empssl.probe([x, u], data, config, None)
    assert alone["representation_top1"] == alone["linear_top1"] > 0.97 and alone["knn_top1"] > 0.97


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_threads_start_leaves_none_running(number, monkeypatch, capsys):
    list(io.progress(range(1)))                                     # tqdm begins a thread of its own with its first bar
    before, start, signals = set(threading.enumerate()), threading.Thread.start, iter([number])

    def start_and_signal(thread):
        start(thread)
        for each in signals:                                        # before the pool has noted that thread
            signal.raise_signal(each)

    def endless():
        for _ in io.progress(itertools.count()):
            time.sleep(0.01)
    monkeypatch.setattr(threading.Thread, "start", start_and_signal)
    with pytest.raises(SystemExit) as stop, io.mistakes_in_one_sentence(), threadpool_limits(2, user_api="openmp"):
        io.side_by_side("cpu", [endless, endless])
    left = set(threading.enumerate()) - before
    io._given_up.set()
    for thread in left:
        thread.join()
    io._given_up.clear()
    assert stop.value.code == 128 + number and not left
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")


def test_tasks_side_by_side_answer_in_order_and_each_on_its_share_of_the_cores():
    both = threading.Barrier(2)
    meet = lambda answer: lambda: (both.wait(10), answer, torch.get_num_threads())[1:]      # waits for ever, alone
    with threadpool_limits(2, user_api="openmp"):
        assert io.side_by_side("cpu", [meet("a"), meet("b")]) == [("a", 1), ("b", 1)] and torch.get_num_threads() == 2
        assert io.side_by_side("meta", [torch.get_num_threads] * 2) == [2, 2]       # no CPU: one after the other, each on all
        A = torch.eye(300).expand(3, 300, 300) + 0.01 * torch.randn(3, 300, 300, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(A @ torch.linalg.inv(A), torch.eye(300).expand_as(A), atol=1e-3, rtol=0)


def test_a_failed_task_is_raised_and_those_beside_it_stop(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    begun, turns = threading.Event(), []

    def endless():
        for turn in io.progress(range(1000)):
            turns.append(turn)
            begun.set()
            time.sleep(0.01)

    def fails():
        begun.wait(10)
        raise io.UsageError("the disk is full")
    with pytest.raises(io.UsageError, match="the disk is full"):
        io.side_by_side("cpu", [fails, endless])
    assert 0 < len(turns) < 1000 and list(io.progress(range(3))) == [0, 1, 2]        # what comes after is not stopped


def test_a_probe_leaves_the_random_numbers_of_others_alone():
    """Two probes at once would otherwise begin where the other has got to."""
    before = torch.get_rng_state()
    linear_probe(*blobs(100, seed=1), *blobs(50, seed=2), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def encoder():
    encoder = Encoder("small", 16, hidden=12, projector=12, dim=8)
    encoder(torch.randn(64, 3, 16, 16))                             # BatchNorm statistics of some kind
    return encoder


def test_embed_averages_the_representation_of_an_images_patches(encoder):
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    h = embed(encoder, images, patches=5, augmentation=Augmentation(), seed=3)
    assert h.shape == (7, 12) and h.dtype == torch.float32 and not encoder.training
    params = sample_patches(7, 5, (32, 32), Augmentation(), generator(3, "embed", 0))
    x = extract_patches(images, torch.arange(7), params, 16)
    with torch.no_grad():
        expected = torch.stack([encoder.representation(x[j::7]).mean(0) for j in range(7)])
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("n,tops,lefts", [(1, [6], [14]), (4, [0, 0, 12, 12], [0, 28, 0, 28]),
                                          (9, [0] * 3 + [6] * 3 + [12] * 3, [0, 14, 28] * 3)])
def test_the_evaluation_grid_is_even_and_the_same_for_each_image(n, tops, lefts):
    """A quarter of a 32 x 48 image is 20 x 20, which leaves room for 12 x 28."""
    params = grid_patches(3, n, (32, 48))
    assert params[:, 0, 0].tolist() == tops and params[:, 0, 1].tolist() == lefts
    assert params[0, 0].tolist()[2:] == [20, 20, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert (params[..., 2:] == params[0, 0, 2:]).all() and (params == params[:, :1]).all()


def test_embed_without_augmentation_averages_the_grid(encoder):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    crops = torch.stack([images[:, :, top:top + 16, left:left + 16] for top in (0, 16) for left in (0, 16)])
    encoder.eval()
    with torch.no_grad():
        expected = encoder.representation(crops.flatten(0, 1) / 127.5 - 1).view(4, 2, -1).mean(0)
    torch.testing.assert_close(embed(encoder, images, patches=4), expected, atol=1e-5, rtol=1e-5)


def test_regions_are_rows_and_in_each_the_sides_and_the_middle():
    x = torch.rand(2, 3, 8, 8)
    parts = [0, 1, 6, 7], [2, 3, 4, 5]
    expected = [x[:, c, 2 * row:2 * row + 2][..., part].mean((1, 2)) / 8 ** 0.5 for part in parts for c in range(3) for row in range(4)]
    torch.testing.assert_close(regions(x), torch.stack(expected, 1))
    torch.testing.assert_close(regions(x.flip(3)), regions(x))


@pytest.mark.parametrize("backbone,s", [("small", 16), ("small", 8), ("small", 1), ("resnet18", 8)])
@pytest.mark.parametrize("dropped", [False, True])
def test_maps_are_the_last_stage_and_the_representation_of_overlapping_patches(backbone, s, dropped):
    encoder = Encoder(backbone, s, hidden=12, projector=12, dim=8, drop_last_stage=dropped)
    encoder(torch.randn(16, 3, s, s))
    encoder.eval()
    x, seen = torch.randn(2, 3, 2 * s, 2 * s), []
    [*encoder.backbone.children()][-3].register_forward_hook(lambda stage, inputs, output: seen.append(output))
    with torch.no_grad():
        encoder.backbone(x)                                         # the whole image, and a mean at its end
        k = max(1, seen[0].shape[-1] // 2)
        starts = range(0, seen[0].shape[-1] - k + 1, max(1, k // 2))
        windows = [seen[0][:, :, i:i + k, j:j + k].mean((2, 3)) for i in starts for j in starts]
        means = torch.stack([encoder.represent(window) for window in windows]).mean(0)
        torch.testing.assert_close(encoder.maps(x), torch.cat([regions(seen[0]), means], 1), atol=1e-5, rtol=1e-5)
    assert s < 16 or len(windows) == 9


def test_embed_shows_the_maps_whole_images_at_twice_the_side(encoder):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder.eval()
    whole = Augmentation.none(area=(1.0, 1.0))
    with torch.no_grad():
        expected = encoder.maps(images / 127.5 - 1)
    torch.testing.assert_close(embed(encoder, images, 1, whole, maps=True), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embed(encoder, images, 1, maps=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["train", "grid", "maps"])
def test_the_sign_of_progress_is_of_the_features_that_are_probed(how, encoder, monkeypatch):
    """kNN of the representation as it is probed, at most four patches of it: here of 60 images against 10."""
    config = empssl.Config(device="cpu", precision="float32", hidden=encoder.architecture["hidden"], augmentation="light", patch_size=16,
                           eval_patches={"maps": 1}.get(how, 4), eval_augmentation=how)
    images, labels = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(60) % 10
    data = io.Dataset(images, labels, None, None, [], "")
    _, at_eval = empssl.augmentations(config, 32, 32)
    seen = []
    monkeypatch.setattr(empssl, "knn_probe", lambda *arguments: seen.extend(arguments) or 0.0)
    empssl.holdout_knn(encoder, data, config, at_eval)
    rows = torch.randperm(60, generator=generator(0, "holdout", 0))
    h = embed(encoder, images[rows], config.eval_patches, at_eval, 0, "float32", how == "maps")[:, -config.hidden:]
    expected = h[10:], labels[rows][10:], h[:10], labels[rows][:10]
    assert len(seen) == 4 and all(torch.allclose(ours, theirs.to(ours), atol=1e-5) for ours, theirs in zip(seen, expected))


def test_evaluation_and_a_new_encoder_leave_the_callers_chance_alone(encoder):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    before = torch.get_rng_state()
    embed(encoder, images, patches=4), embed(encoder, images, 2, Augmentation())
    empssl.new_encoder(empssl.Config(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=4), images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_encoder_is_a_matter_of_its_seed_and_whitened():
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    new = lambda seed: empssl.new_encoder(empssl.Config(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=4, seed=seed), images)
    a, b, c = ([p.detach().clone() for p in new(seed).parameters()] for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a, b)) and not any(torch.equal(p, q) for p, q in zip(a, c) if p.ndim > 1)
    assert torch.equal(a[0][27:54], -a[0][:27])


def test_an_untrained_encoder_has_the_statistics_of_training_patches():
    """The first BatchNorm's, of grey images of one brightness each: jittered, so darker and lighter than they are."""
    images = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
    config = empssl.Config(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=4, augmentation="light")
    encoder = empssl.settled(empssl.new_encoder(config, torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)), images, config)
    (convolution, norm), params = encoder.backbone[:2], sample_patches(64, 100, (32, 32), empssl.augmentations(config, 32, 32)[0])
    with torch.no_grad():
        x = convolution(extract_patches(images, torch.arange(64), params, 16))
    wide = x.var((0, 2, 3)) > 0.01 * x.var((0, 2, 3)).max()
    torch.testing.assert_close(norm.running_mean[wide], x.mean((0, 2, 3))[wide], rtol=0.2, atol=0.1 * x.std().item())
    torch.testing.assert_close(norm.running_var[wide], x.var((0, 2, 3))[wide], rtol=0.2, atol=0)


def test_what_untrained_is_remembered_by():
    """Whatever the features of an untrained encoder come from."""
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    data = io.Dataset(images, None, None, None, [], "some")

    def key(data=data, at_eval=None, **settings):
        how = dict(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=4, precision="float32", augmentation="light",
                   eval_augmentation="grid", eval_patches=4)
        config = empssl.Config(**how | settings)
        return io.untrained_key(data, config, empssl.new_encoder(config, images), at_eval)
    others = [key(data._replace(key="other")), key(at_eval=Augmentation())]
    others += [key(**{name: value}) for name, value in dict(seed=1, patch_size=8, eval_patches=9, eval_augmentation="train", augmentation="paper",
                                                            precision="bf16", hidden=9, drop_last_stage=True).items()]
    assert key() == key(lr=5.0, projector=9) and len({key(), *others}) == 11


def test_raw_pixels_are_the_images_own():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(io.pixels(images), (images / 127.5 - 1).flatten(1))
    assert io.pixels(images.repeat_interleave(2, 2).repeat_interleave(2, 3)).sub(io.pixels(images)).abs().max() < 1e-5


def test_a_new_encoder_of_large_images_is_finite():
    images = torch.randint(0, 256, (3, 3, 1500, 1500), dtype=torch.uint8)
    encoder = empssl.new_encoder(empssl.Config(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=4), images)
    assert all(p.isfinite().all() for p in encoder.parameters())


def test_a_pointwise_convolution_is_a_convolution():
    ours, theirs = Pointwise(6, 10, bias=False), torch.nn.Conv2d(6, 10, 1, bias=False)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.flatten(1))
    x = torch.randn(3, 6, 5, 4).to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_embed_keeps_the_order_of_many_images(encoder):
    images = torch.randint(0, 256, (1100, 1, 1, 1), dtype=torch.uint8).expand(-1, 3, 16, 16)       # more than a batch
    h = embed(encoder, images, patches=4)
    torch.testing.assert_close(h[700:], embed(encoder, images[700:], patches=4), atol=1e-5, rtol=1e-5)


def test_whitening_starts_the_first_convolution_at_unit_variance_without_correlation():
    """On images whose channels and neighbours are strongly correlated; filters come with both signs."""
    smooth = F.interpolate(torch.rand(300, 1, 8, 8) * torch.rand(300, 3, 1, 1), size=32, mode="bilinear")
    images = (255 * (smooth + 0.1 * torch.rand(300, 3, 32, 32)).clamp(0, 1)).to(torch.uint8)
    first = torch.nn.Conv2d(3, 60, 3, stride=2, padding=1, bias=False)
    whiten(first, images)
    y = F.conv2d(images / 127.5 - 1, first.weight, stride=3).transpose(0, 1).flatten(1)          # (60, places)
    covariance = y[:27].cov()
    strong = covariance.diagonal() > 0.5                            # weak components are held back by the 1e-3
    assert strong.sum() >= 5
    torch.testing.assert_close(covariance[strong][:, strong], torch.eye(int(strong.sum())), atol=0.3, rtol=0)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.05
    assert torch.equal(first.weight[27:54], -first.weight[:27]) and 0.3 < y[54:].var(1).mean() < 1.1


def test_encoder_shapes_and_unit_rows():
    for backbone, s, width in (("resnet18", 32, 512), ("small", 16, 384)):
        encoder = Encoder(backbone, s, hidden=24, projector=24, dim=6)
        x = torch.randn(4, 3, s, s)
        assert encoder.backbone(x).shape == (4, width) and encoder.representation(x).shape == (4, 24)
        torch.testing.assert_close(encoder(x).norm(dim=1), torch.ones(4))
    assert encoder.architecture == dict(backbone="small", patch_size=16, hidden=24, projector=24, dim=6, drop_last_stage=False)


def test_the_papers_network():
    encoder = Encoder()
    assert encoder.backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert encoder.backbone.layer4[1].conv2.weight.shape == (512, 512, 3, 3)
    assert encoder.backbone.conv1.weight.shape == (64, 3, 3, 3) and encoder.backbone.conv1.stride == (1, 1)
    shapes = [tuple(p.shape) for m in (encoder.represent, encoder.project) for p in m.parameters() if p.ndim == 2]
    assert shapes == [(4096, 512), (4096, 4096), (1024, 4096)]
    assert Encoder(patch_size=224).backbone.conv1.weight.shape == (64, 3, 7, 7)
    with pytest.raises(ValueError, match="resnet18"):
        Encoder("vgg")
    assert K == 13
