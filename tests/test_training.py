"""fit() against a plain loop, and what it does when it is stopped, misused or diverges."""

import dataclasses
import errno
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import start
from tiny import (
    TINY_LAMBDA,
    file_after_each_epoch,
    same,
    tiny_data,
    tiny_model,
    tiny_profile,
    train,
)
from torch import nn
from torch.testing import assert_close

from models.vgg import VGG
from utils import training
from utils.engine import seconds_per_epoch
from utils.images.data import ImageData
from utils.sparsity import add_l1_subgradient, bn_layers
from utils.step import TrainStep
from utils.store.checkpoint import CheckpointError, load, save
from utils.store.resume import only_writer
from utils.training import DivergenceError, Evaluation, Stopped, evaluate, fit, learning_rate

# --- the learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "tenths"),  # how often the rate has been divided by ten, epoch by epoch
    [
        (1, [0]),
        (2, [0, 0]),
        (3, [0, 0, 0]),
        (4, [0, 0, 1, 2]),
        (5, [0, 0, 1, 2, 2]),
        (20, [0] * 10 + [1] * 5 + [2] * 5),
        (160, [0] * 80 + [1] * 40 + [2] * 40),
    ],
)
def test_the_step_schedule_drops_at_whole_epochs(epochs, tenths):
    profile = tiny_profile(epochs=epochs, lr=0.1, schedule="step")
    found = [learning_rate(profile, epoch) for epoch in range(epochs)]
    assert found == pytest.approx([0.1 / 10**k for k in tenths])


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 20, 160])
def test_the_cosine_schedule_warms_up_and_falls_to_nearly_zero(epochs):
    profile = tiny_profile(epochs=epochs, lr=0.2, schedule="cosine")
    rates = [learning_rate(profile, epoch) for epoch in range(epochs)]
    falling = rates[1:] if epochs >= 4 else rates
    assert epochs < 4 or rates[0] == pytest.approx(0.1)
    assert all(0 < r < 0.2 for r in rates) and falling == sorted(set(falling), reverse=True)
    assert np.mean(falling) == pytest.approx(0.1)  # a cosine is as long above its middle as below
    assert epochs < 20 or falling[-1] < 0.002 < 0.198 < falling[0]


# --- evaluate ------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that are known beforehand: the first three pixels of an image."""

    def forward(self, images):
        return images[:, 0, 0, :3]


def test_evaluate_is_the_mean_over_images_not_batches():
    logits = np.random.default_rng(0).normal(size=(7, 3))
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    images = torch.zeros(7, 3, 32, 32)
    images[:, 0, 0, :3] = torch.tensor(logits)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(7), labels]
    accuracy = 100 * np.mean(logits.argmax(1) == labels)
    batches = list(zip(images.split(3), torch.tensor(labels).split(3), strict=True))
    found = evaluate(Fixed(), batches)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert found.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_uses_running_statistics_and_changes_nothing(mode):
    model, data = tiny_model().train(mode), tiny_data()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = evaluate(model, data.plain_batches("test", 4))
    assert model.training is mode and same(dict(model.state_dict()), before)
    images, labels = next(data.plain_batches("test", 10))
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(images), labels).item()
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_evaluate_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="no batches"):
        evaluate(tiny_model(), [])


# --- fit against a plain loop --------------------------------------------------------------------


def plain_fit(model: VGG, data: ImageData, profile, l1_lambda: float, teacher=None) -> VGG:
    """What fit() should do, as a textbook writes it; λ·Σ|γ| is part of the loss, for autograd."""
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=profile.lr,
        momentum=profile.momentum,
        weight_decay=profile.weight_decay,
        nesterov=profile.nesterov,
        foreach=False,
        fused=False,
    )
    how = {"seed": profile.seed, "crop_padding": profile.crop_padding, "flip": profile.flip}
    model.train()
    for epoch in range(profile.epochs):
        for images, labels in data.train_batches(profile.batch_size, epoch=epoch, **how):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    p = (teacher.eval()(images) / 4).softmax(1)  # softened at temperature 4
                gap = (p * (p.log() - (logits / 4).log_softmax(1))).sum(1).mean() * 4**2
                loss = (1 - profile.distillation) * loss + profile.distillation * gap
            loss = loss + l1_lambda * sum(gamma.abs().sum() for gamma in gammas)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("l1_lambda", [0, 0.0, 0.05])
@pytest.mark.parametrize("changes", [{}, {"nesterov": True}, {"momentum": 0, "weight_decay": 0.01}])
def test_fit_is_sgd_on_the_loss_plus_the_l1_penalty(l1_lambda, changes):
    profile, data = tiny_profile(epochs=2, **changes), tiny_data()
    expected = plain_fit(tiny_model(), data, profile, l1_lambda)
    model = tiny_model()
    fit(model, data, profile, l1_lambda=l1_lambda)
    assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    if l1_lambda:  # the comparison is sharp enough to see a λ that is 1 % off
        other = plain_fit(tiny_model(), data, profile, l1_lambda * 1.01)
        with pytest.raises(AssertionError):
            assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distillation", [0.3, 1.0])
def test_a_teacher_adds_its_softened_predictions_and_stays_as_it_was(distillation):
    profile, data = tiny_profile(epochs=2, distillation=distillation), tiny_data()
    teacher = tiny_model(seed=5)
    teacher.classifier.weight.data *= 100  # an opinion
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    expected = plain_fit(tiny_model(), data, profile, 0.0, teacher)
    model, alone = tiny_model(), tiny_model()
    fit(model, data, profile, teacher=teacher)
    fit(alone, data, profile)
    assert same(dict(teacher.state_dict()), before)
    assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.classifier.weight, alone.classifier.weight, atol=1e-3)


def test_the_history_is_what_can_be_measured_afterwards(capsys):
    model, data, profile = tiny_model(), tiny_data(), tiny_profile(epochs=5)
    history = fit(model, data, profile, l1_lambda=0.5)
    assert len(history) == 5
    assert history.lr == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    test = evaluate(model, data.plain_batches("test", 1000))
    assert (history.test_loss[-1], history.test_accuracy[-1]) == (test.loss, test.accuracy)
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert history.sparsity[-1] == pytest.approx((gammas.abs() < 1e-2).float().mean().item())
    assert capsys.readouterr().out.count("sparsity") == 5  # a line for each epoch


def test_the_mean_loss_weighs_a_smaller_batch_by_its_size():
    # With lr ≈ 0 the network stays, so every image has one loss, whichever batch it comes in.
    profile = tiny_profile(epochs=1, lr=1e-30, batch_size=26, flip=False, crop_padding=0)
    whole = fit(tiny_model(), tiny_data(), profile).train_loss[0]
    model, data = tiny_model().train(), tiny_data()
    images, labels = next(data.plain_batches("train", 26))
    assert whole == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    parts = fit(tiny_model(), data, dataclasses.replace(profile, batch_size=16))
    assert parts.train_loss[0] == pytest.approx(whole, rel=0.05)


def test_no_gradients_are_left_in_memory():
    model = tiny_model()
    fit(model, tiny_data(), tiny_profile(epochs=1), quiet=True)
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_decides_the_weights():
    def weights(seed):
        model = tiny_model()
        fit(model, tiny_data(), tiny_profile(seed=seed))
        return dict(model.state_dict())

    assert same(weights(1), weights(1))
    assert not same(weights(1), weights(2))


# --- stopped and started again -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"l1_lambda": 0.0}, {"teacher": tiny_model(seed=5)}, {"kind": "finetuned"}],
    ids=["λ > 0", "λ = 0", "teacher", "kind"],
)
def test_a_run_resumed_from_any_epoch_ends_with_the_same_bytes(tmp_path, options):
    after_epoch = file_after_each_epoch(tmp_path / "whole.pt", **options)
    whole = train(tmp_path / "whole.pt", **options)  # it just loads
    assert len(after_epoch) == 3 and len(set(after_epoch)) == 3
    for saved in after_epoch:
        (tmp_path / "part.pt").write_bytes(saved)
        assert train(tmp_path / "part.pt", **options) == whole
        assert (tmp_path / "part.pt").read_bytes() == after_epoch[-1]


def test_the_file_holds_weights_history_and_settings_and_momentum_until_it_is_done(tmp_path, runs):
    model = tiny_model()
    history = fit(
        model, tiny_data(), tiny_profile(), l1_lambda=TINY_LAMBDA, checkpoint=tmp_path / "x.pt"
    )
    found = load(tmp_path / "x.pt", kind="trained")
    assert same(found.state_dict, dict(model.state_dict()))
    assert found.history == dataclasses.asdict(history)
    assert found.optimizer == {} and found.settings["lr"] == 0.1
    assert (tmp_path / "x.pt").read_bytes() == runs[2]
    (tmp_path / "x.pt").write_bytes(runs[1])
    found = load(tmp_path / "x.pt")
    assert all(m.abs().sum() > 0 for m in found.optimizer["momentum"])


@pytest.mark.parametrize(
    ("save_every", "saved"), [(0, [1, 2, 3, 4, 5]), (40, [2, 3, 4, 5]), (60, [3, 5]), (999, [5])]
)
def test_a_file_is_saved_at_the_end_and_before_it_not_too_often(
    tmp_path, monkeypatch, save_every, saved
):
    path, now, found = tmp_path / "x.pt", [0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def look(history):
        now[0] += 40  # seconds an epoch
        if path.exists() and len(load(path).history["lr"]) == len(history):
            found.append(len(history))

    train(path, epochs=5, save_every=save_every, on_epoch=look)
    assert found == saved


def test_a_finished_run_just_loads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.pt"
    history = train(path)
    before = path.read_bytes(), path.stat().st_mtime_ns

    def no_work(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(TrainStep, "__init__", no_work)
    monkeypatch.setattr("os.replace", no_work)
    model = tiny_model()
    found = fit(model, tiny_data(), tiny_profile(), l1_lambda=TINY_LAMBDA, checkpoint=path)
    assert found == history and same(dict(model.state_dict()), load(path).state_dict)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert "3 of 3 epochs were done before" in capsys.readouterr().out


def test_a_run_that_goes_on_shows_the_epochs_it_has_and_a_quiet_one_only_the_last(tmp_path, capsys):
    path, seen = tmp_path / "x.pt", []
    train(path, quiet=True, label="the second way")
    lines = [line for line in capsys.readouterr().out.split("\n") if "lr" in line or "CPU" in line]
    assert len(lines) == 1 and "the second way: epoch   3/3" in lines[0]
    train(path, on_epoch=lambda history: seen.append(len(history)), quiet=True)
    assert seen == [3] and capsys.readouterr().out == ""


def stopped_at_step(monkeypatch, number):
    steps, step = [], TrainStep.__call__

    def stopped(*args):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(TrainStep, "__call__", stopped)


@pytest.mark.parametrize(("step", "saved"), [(2, 0), (5, 1), (9, 2)])
def test_the_stop_button_says_what_is_kept_and_run_again_it_goes_on(
    tmp_path, monkeypatch, runs, step, saved
):
    path = tmp_path / "x.pt"
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        stopped_at_step(patch, step)
        train(path)
    said = f"stopped; {saved} of 3 epochs are saved; run this cell again to go on"
    assert str(caught.value) == said and caught.value._render_traceback_() == [said]
    assert isinstance(caught.value, KeyboardInterrupt)  # `except Exception` does not catch it
    assert (path.read_bytes() if saved else path.exists()) == (saved and runs[saved - 1])
    train(path)
    assert path.read_bytes() == runs[2]


def test_the_stop_button_counts_what_was_saved_not_what_was_done(tmp_path, monkeypatch):
    stopped_at_step(monkeypatch, 8)
    with pytest.raises(Stopped, match="stopped; 0 of 3 epochs are saved;"):
        train(tmp_path / "x.pt", save_every=1e9)
    stopped_at_step(monkeypatch, 8)
    with pytest.raises(Stopped, match="stopped; nothing is saved;"):
        fit(tiny_model(), tiny_data(), tiny_profile())


def test_a_network_that_no_training_wrote_is_not_gone_on_with(tmp_path, runs):
    path = tmp_path / "x.pt"
    path.write_bytes(runs[0])
    save(path, dataclasses.replace(load(path), history={}, optimizer={}))
    with pytest.raises(CheckpointError, match=r"x\.pt: no training can go on from this file"):
        train(path)


def _changed(**changes):
    return {"profile": tiny_profile(**changes)}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (_changed(epochs=4), ["epochs = 3, now 4"]),
        (_changed(lr=0.2), ["lr = 0.1, now 0.2"]),
        (_changed(precision="bfloat16"), ["precision = 'float32', now 'bfloat16'"]),
        (_changed(schedule="cosine"), ["schedule = 'step', now 'cosine'"]),
        (_changed(batch_size=9), ["batch_size = 10, now 9"]),
        (_changed(momentum=0.8), ["momentum = 0.9, now 0.8"]),
        (_changed(nesterov=True), ["nesterov = False, now True"]),
        (_changed(weight_decay=0), ["weight_decay = 0.0001, now 0"]),
        (_changed(crop_padding=4), ["crop_padding = 2, now 4"]),
        (_changed(flip=False), ["flip = True, now False"]),
        (_changed(seed=2), ["seed = 1, now 2"]),
        (_changed(seed=2, lr=0.2), ["seed = 1, now 2", "lr = 0.1, now 0.2"]),
        ({"l1_lambda": 0.5}, ["l1_lambda = 0.001, now 0.5"]),
        ({"model": VGG([3, 5], num_classes=3)}, ["cfg = [3, 4, 'M', 5], now [3, 5]"]),
        ({"model": tiny_model(seed=9)}, ["starting weights = "]),
        ({"data": tiny_data(seed=9)}, ["images = "]),
        ({"penalty": lambda model, l1_lambda: None}, ["penalty = "]),
        ({"teacher": tiny_model(seed=5)}, ["teacher weights = None, now", "distillation = None"]),
        ({"kind": "finetuned"}, ["'trained'", "'finetuned'"]),
    ],
    ids=lambda v: v[0].split("=")[0] if isinstance(v, list) else "",
)
@pytest.mark.parametrize("done", [1, 3])
def test_a_file_made_with_other_settings_is_not_gone_on_with(tmp_path, runs, now, said, done):
    path = tmp_path / "x.pt"
    path.write_bytes(runs[done - 1])
    before = path.read_bytes()
    defaults = {
        "model": tiny_model(),
        "data": tiny_data(),
        "profile": tiny_profile(),
        "l1_lambda": TINY_LAMBDA,
    }
    options = defaults | now
    with pytest.raises(CheckpointError) as caught:
        fit(**options, checkpoint=path)
    assert all(part in str(caught.value) for part in [str(path), *said])
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The file of a run after each of its epochs."""
    return file_after_each_epoch(tmp_path_factory.mktemp("runs") / "x.pt")


# --- the penalty is part of what a run is --------------------------------------------------------


def written_out(model, l1_lambda):
    for bn in bn_layers(model):
        bn.weight.grad += l1_lambda * torch.sign(bn.weight.detach())


def by_autograd(model, l1_lambda):
    gammas = [bn.weight for bn in bn_layers(model)]
    pull = l1_lambda * sum(gamma.abs().sum() for gamma in gammas)
    for gamma, gradient in zip(gammas, torch.autograd.grad(pull, gammas), strict=True):
        gamma.grad += gradient


def wrong_sign(model, l1_lambda):
    written_out(model, -l1_lambda)


def l2(model, l1_lambda):
    for bn in bn_layers(model):
        bn.weight.grad += l1_lambda * bn.weight.detach()


def first_layer_only(model, l1_lambda):
    gamma = bn_layers(model)[0].weight
    gamma.grad += l1_lambda * gamma.detach().sign()


def of_beta_too(model, l1_lambda):
    written_out(model, l1_lambda)
    for bn in bn_layers(model):
        bn.bias.grad += l1_lambda * bn.bias.detach().sign() + l1_lambda


@pytest.mark.parametrize("before", [wrong_sign, l2, first_layer_only, of_beta_too])
def test_a_run_with_a_mistake_in_its_penalty_is_not_taken_for_the_corrected_one(tmp_path, before):
    path = tmp_path / "x.pt"
    train(path, penalty=before)
    with pytest.raises(CheckpointError, match="penalty = "):
        train(path, penalty=add_l1_subgradient)


@pytest.mark.parametrize("written", [written_out, by_autograd])
def test_the_same_penalty_written_differently_is_the_same_run(tmp_path, runs, written):
    path = tmp_path / "x.pt"
    path.write_bytes(runs[0])
    assert len(train(path, penalty=written)) == 3


# --- other files ---------------------------------------------------------------------------------


def test_a_profile_may_change_what_training_does_not_depend_on(tmp_path, runs):
    path = tmp_path / "x.pt"
    path.write_bytes(runs[0])
    profile = tiny_profile(name="other", test_batch_size=10, pruning_ratios=(0.3,), epochs=3)
    fit(tiny_model(), tiny_data(), profile, l1_lambda=TINY_LAMBDA, checkpoint=path)
    assert path.read_bytes() == runs[-1]


def test_a_damaged_file_is_neither_used_nor_overwritten(tmp_path, runs):
    path = tmp_path / "x.pt"
    path.write_bytes(runs[0][:-100])
    with pytest.raises(CheckpointError, match=r"x\.pt.*damaged"):
        train(path)
    assert path.read_bytes() == runs[0][:-100]


def test_what_a_killed_save_left_behind_is_removed(tmp_path):
    left = [tmp_path / "x.pt.123.tmp", tmp_path / "x.pt.99999.tmp"]
    others = [tmp_path / "y.pt.123.tmp", tmp_path / "x.pt.backup", tmp_path / "[x].pt.1.tmp"]
    for file in [*left, *others]:
        file.write_text("half a file")
    train(tmp_path / "x.pt")
    assert {*tmp_path.iterdir()} == {tmp_path / "x.pt", *others}
    train(tmp_path / "[x].pt")
    assert not others[-1].exists()


def _hold(path, ready):
    with only_writer(path):
        ready.touch()
        while ready.exists():
            pass


def test_two_runs_never_write_one_file(tmp_path, monkeypatch):
    path, ready = tmp_path / "x.pt", tmp_path / "ready"
    other = start(_hold, path, ready)
    try:
        while not ready.exists():
            assert other.is_alive()
        monkeypatch.chdir(tmp_path)
        for name in (path, str(path), "x.pt"):
            with pytest.raises(CheckpointError, match=r"x\.pt: another notebook is writing"):
                train(name)
        assert not path.exists()
        train(tmp_path / "y.pt")  # another file is free
    finally:
        other.kill()
        other.join()
    train(path)  # a lock dies with its process
    assert len(load(path).history["lr"]) == 3


# --- misused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("l1_lambda", [-1e-9, -1, math.nan, math.inf, -math.inf, True, False])
def test_a_lambda_that_makes_no_sense_is_refused_before_any_work(tmp_path, monkeypatch, l1_lambda):
    monkeypatch.setattr(TrainStep, "__init__", None)
    with pytest.raises(ValueError, match=rf"l1_lambda = {l1_lambda}"):
        train(tmp_path / "x.pt", l1_lambda=l1_lambda)
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_model_with_other_classes_than_the_data_is_refused(monkeypatch, num_classes):
    monkeypatch.setattr(TrainStep, "__init__", None)
    with pytest.raises(ValueError, match=rf"num_classes = {num_classes}.* 3 classes"):
        fit(tiny_model(num_classes=num_classes), tiny_data(), tiny_profile())


# --- diverging -----------------------------------------------------------------------------------


def _poisoned_weight(monkeypatch):
    model = tiny_model()
    model.classifier.weight.data[0, 0] = math.nan
    return partial(fit, model, tiny_data(), tiny_profile(), l1_lambda=0.25)


def _poisoned_image(monkeypatch):
    batches = ImageData.train_batches

    def with_nan(self, *args, **options):
        for images, labels in batches(self, *args, **options):
            images[0, 0, 0, 0] = math.nan
            yield images, labels

    monkeypatch.setattr(ImageData, "train_batches", with_nan)
    return partial(fit, tiny_model(), tiny_data(), tiny_profile(), l1_lambda=0.25)


def _poisoned_by_the_last_step(monkeypatch):
    read = TrainStep.read

    def poison(step):
        step.model.feature[1].bias.data[0] = math.inf  # no loss has seen it yet
        return read(step)

    monkeypatch.setattr(TrainStep, "read", poison)
    return partial(fit, tiny_model(), tiny_data(), tiny_profile(), l1_lambda=0.25)


def _infinite_test_loss(monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: Evaluation(math.inf, 10.0, 1, 10))
    return partial(fit, tiny_model(), tiny_data(), tiny_profile(), l1_lambda=0.25)


def _wild_lr(monkeypatch):
    return partial(fit, tiny_model(), tiny_data(), tiny_profile(lr=1e6), l1_lambda=0.25)


def _wild_lambda(monkeypatch):
    return partial(fit, tiny_model(), tiny_data(), tiny_profile(batch_size=2), l1_lambda=1e3)


@pytest.mark.parametrize(
    "wrong",
    [
        _poisoned_weight,
        _poisoned_image,
        _poisoned_by_the_last_step,
        _infinite_test_loss,
        _wild_lr,
        _wild_lambda,
    ],
)
def test_a_run_that_diverges_stops_in_its_first_epoch(tmp_path, monkeypatch, wrong):
    run = wrong(monkeypatch)
    with pytest.raises(DivergenceError, match=r"epoch 1\b") as caught:
        run(checkpoint=tmp_path / "x.pt")
    l1_lambda = 1000 if wrong is _wild_lambda else 0.25
    lr = "1e+06" if wrong is _wild_lr else "0.1"
    assert f"λ = {l1_lambda}" in str(caught.value) and f"lr = {lr}" in str(caught.value)
    assert not (tmp_path / "x.pt").exists()


def test_after_a_divergence_the_last_sound_epoch_is_still_there(tmp_path, monkeypatch, runs):
    path, rate = tmp_path / "x.pt", training.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", lambda p, e: rate(p, e) if e < 2 else 1e9)
        with pytest.raises(DivergenceError, match=r"epoch 3\b"):
            train(path)
    assert path.read_bytes() == runs[1]
    train(path)  # with the cause gone it goes on
    assert path.read_bytes() == runs[2]


def test_a_full_disk_stops_the_run_and_keeps_the_last_epoch(tmp_path, monkeypatch, runs):
    path, saves, replace = tmp_path / "x.pt", [], os.replace

    def disk_full_at_the_third(*args):
        saves.append(args)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", disk_full_at_the_third)
        with pytest.raises(CheckpointError, match="No space left"):
            train(path)
    assert path.read_bytes() == runs[1]
    train(path)
    assert path.read_bytes() == runs[2]


def test_a_gpu_too_small_for_the_batch_is_told_by_the_batch_size(monkeypatch):
    def too_much(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainStep, "__call__", too_much)
    with pytest.raises(MemoryError, match="batch_size = 10: too large"):
        fit(tiny_model(), tiny_data(), tiny_profile())
    with pytest.raises(MemoryError, match="batch_size = 10: too large"):
        seconds_per_epoch(tiny_model(), tiny_data(), tiny_profile())


def test_a_gpu_too_small_for_testing_is_told_by_the_test_batch_size(monkeypatch):
    forward = VGG.forward

    def too_much(model, images):
        if model.training:
            return forward(model, images)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VGG, "forward", too_much)
    for task in (fit, seconds_per_epoch):
        with pytest.raises(MemoryError, match="test_batch_size = 1000: too large"):
            task(tiny_model(), tiny_data(), tiny_profile())
