"""fit() against a plain loop, and what it does when it is stopped, misused or diverges."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import file_after_each_epoch, same, tiny_data, tiny_model, tiny_profile, train
from torch import nn
from torch.testing import assert_close

from models.vgg import VGG
from utils import training
from utils.engine import seconds_per_epoch
from utils.images.data import ImageData
from utils.sparsity import bn_layers
from utils.step import TrainStep
from utils.store.checkpoint import CheckpointError, load
from utils.store.files import InUse, one_at_a_time
from utils.training import DivergenceError, Evaluation, Stopped, evaluate, fit, learning_rate


@pytest.mark.parametrize(
    ("epochs", "tenths"),  # how often the rate has been divided by ten, epoch by epoch
    [(3, [0, 0, 0]), (5, [0, 0, 1, 2, 2]), (20, [0] * 10 + [1] * 5 + [2] * 5)],
)
def test_the_step_schedule_drops_at_whole_epochs(epochs, tenths):
    profile = tiny_profile(epochs=epochs, lr=0.1, schedule="step")
    found = [learning_rate(profile, epoch) for epoch in range(epochs)]
    assert found == pytest.approx([0.1 / 10**k for k in tenths])


@pytest.mark.parametrize(
    ("epochs", "shares"),  # of the rate, by a table of cosines: 30°, 90°, 150°; 22.5°, 67.5°, …
    [(3, [0.9330, 0.5, 0.0670]), (5, [0.5, 0.9619, 0.6913, 0.3087, 0.0381])],
)
def test_the_cosine_schedule_warms_up_and_falls_to_nearly_zero(epochs, shares):
    profile = tiny_profile(epochs=epochs, lr=0.2, schedule="cosine")
    found = [learning_rate(profile, epoch) / 0.2 for epoch in range(epochs)]
    assert found == pytest.approx(shares, abs=1e-4)


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
    assert (found.correct, found.images) == (round(accuracy * 7 / 100), 7)


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


RATES = (0.1, 0.1, 0.01, 0.001)


def plain_fit(model: VGG, data: ImageData, profile, l1_lambda: float, teacher=None):
    """Mean loss, without the penalty, and accuracy of each epoch of what fit() should do, as a
    textbook writes it; λ·Σ|γ| is part of the loss, for autograd."""
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    how = {name: getattr(profile, name) for name in ("momentum", "weight_decay", "nesterov")}
    optimizer = torch.optim.SGD(model.parameters(), foreach=False, fused=False, **how)
    how = {"seed": profile.seed, "crop_padding": profile.crop_padding, "flip": profile.flip}
    epochs = []
    model.train()
    for epoch in range(profile.epochs):
        optimizer.param_groups[0]["lr"] = RATES[epoch]
        losses, hits = [], []
        for images, labels in data.train_batches(profile.batch_size, epoch=epoch, **how):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    p = (teacher.eval()(images) / 4).softmax(1)  # softened at temperature 4
                gap = (p * (p.log() - (logits / 4).log_softmax(1))).sum(1).mean() * 4**2
                loss = (1 - profile.distillation) * loss + profile.distillation * gap
            losses += [loss.item()] * len(labels)
            hits += (logits.argmax(1) == labels).tolist()
            loss = loss + l1_lambda * sum(gamma.abs().sum() for gamma in gammas)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epochs.append((np.mean(losses), 100 * np.mean(hits)))
    return epochs


@pytest.mark.parametrize(
    ("l1_lambda", "changes"),
    [(0.05, {"nesterov": True, "weight_decay": 0.05}), (0, {"momentum": 0}), (0.05, {})],
)
def test_fit_is_sgd_on_the_loss_plus_the_l1_penalty(l1_lambda, changes):
    profile, data = tiny_profile(epochs=4, **changes), tiny_data()
    model, expected = tiny_model(), tiny_model()
    epochs = plain_fit(expected, data, profile, l1_lambda)
    history = fit(model, data, profile, l1_lambda=l1_lambda)
    assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    assert history.lr == pytest.approx(RATES)
    found = list(zip(history.train_loss, history.train_accuracy, strict=True))
    assert_close(torch.tensor(found), torch.tensor(epochs, dtype=torch.float), rtol=1e-4, atol=1e-5)


def test_a_teacher_adds_its_softened_predictions_and_stays_as_it_was():
    profile, data = tiny_profile(epochs=2, distillation=0.3), tiny_data()
    teacher = tiny_model(seed=5)
    teacher.classifier.weight.data *= 100  # an opinion
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    model, expected, alone = tiny_model(), tiny_model(), tiny_model()
    plain_fit(expected, data, profile, 0.0, teacher)
    fit(model, data, profile, teacher=teacher)
    fit(alone, data, profile)
    assert same(dict(teacher.state_dict()), before)
    assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.classifier.weight, alone.classifier.weight, atol=1e-3)


def test_the_history_is_what_can_be_measured_afterwards(capsys):
    model, data, profile = tiny_model(), tiny_data(), tiny_profile(epochs=5, lr=1e-4)
    model.feature[1].weight.data[:2] = 1e-3  # sparse, and at this rate it stays so
    history = fit(model, data, profile, l1_lambda=0.5)
    assert len(history) == 5
    test = evaluate(model, data.plain_batches("test", 1000))
    assert (history.test_loss[-1], history.test_accuracy[-1]) == (test.loss, test.accuracy)
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    share = (gammas.abs() < 1e-2).float().mean().item()
    assert history.sparsity[-1] == pytest.approx(share) == pytest.approx(2 / 12)
    assert capsys.readouterr().out.count("sparsity") == 5  # a line for each epoch


def test_the_seed_decides_the_order_of_the_images():
    weights = []
    for seed in (1, 1, 2):
        fit(model := tiny_model(), tiny_data(), tiny_profile(seed=seed, epochs=1))
        weights.append(dict(model.state_dict()))
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])


def test_a_network_with_frozen_gamma_trains_without_a_penalty_and_is_refused_with_one(path):
    frozen = bn_layers(model := tiny_model())[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"l1_lambda = 0\.1: γ is frozen in feature\.4, .* = True"):
        train(path, model=model, l1_lambda=0.1, penalty=written_out)
    assert not path.exists() and (frozen == 0.5).all()
    train(path, model=model, l1_lambda=0, epochs=1)
    assert (frozen == 0.5).all() and (bn_layers(model)[0].weight != 0.5).any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The file of a run after each of its epochs."""
    return file_after_each_epoch(tmp_path_factory.mktemp("runs") / "x.safetensors")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "options", [{}, {"l1_lambda": 0.0, "teacher": tiny_model(seed=5), "kind": "finetuned"}]
)
def test_a_run_resumed_from_any_epoch_ends_with_the_same_bytes(tmp_path, path, options):
    after_epoch = file_after_each_epoch(tmp_path / "whole.safetensors", **options)
    whole = train(tmp_path / "whole.safetensors", **options)  # it just loads
    assert len(set(after_epoch)) == len(after_epoch) == 3
    for saved in after_epoch:
        path.write_bytes(saved)
        assert train(path, **options) == whole
        assert path.read_bytes() == after_epoch[-1]


def test_the_file_holds_weights_and_history_and_momentum_until_it_is_done(path, runs):
    model, histories = tiny_model(), []
    train(path, model=model, on_epoch=histories.append)
    found = load(path, kind="trained")
    assert same(found.state_dict, dict(model.state_dict()))
    assert found.history == dataclasses.asdict(histories[-1]) and found.optimizer == {}
    assert path.read_bytes() == runs[2]
    path.write_bytes(runs[1])
    assert all(m.abs().sum() > 0 for m in load(path).optimizer["momentum"])


@pytest.mark.parametrize(("save_every", "saved"), [(0, [1, 2, 3, 4, 5]), (60, [3, 5])])
def test_a_file_is_saved_at_the_end_and_before_it_not_too_often(
    path, monkeypatch, save_every, saved
):
    now, found = [0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def look(history):
        now[0] += 40  # seconds an epoch
        if path.exists() and len(load(path).history["lr"]) == len(history):
            found.append(len(history))

    train(path, epochs=5, save_every=save_every, on_epoch=look)
    assert found == saved


def test_a_finished_run_just_loads(path, runs, monkeypatch, capsys):
    path.write_bytes(runs[2])

    def no_work(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(TrainStep, "__init__", no_work)
    monkeypatch.setattr("os.replace", no_work)
    model, shown = tiny_model(), []
    history = train(path, model=model, on_epoch=lambda h: shown.append(len(h)))
    assert shown == [3] and dataclasses.asdict(history) == load(path).history
    assert same(dict(model.state_dict()), load(path).state_dict)
    assert "epoch   3/3" in (said := capsys.readouterr().out) and "done before" in said


def test_one_line_stands_under_a_curve_that_shows_the_epochs(path, capsys):
    train(path, label="the second way", on_epoch=lambda _: None)
    lines = [line for line in capsys.readouterr().out.split("\n") if "sparsity" in line]
    assert len(lines) == 1 and "the second way: epoch   3/3" in lines[0]


def stopped_at_step(monkeypatch, number):
    steps, step = [], TrainStep.__call__

    def stopped(*args):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(TrainStep, "__call__", stopped)


@pytest.mark.parametrize(("step", "saved"), [(2, 0), (5, 1)])
def test_the_stop_button_says_what_is_kept_and_run_again_it_goes_on(
    path, monkeypatch, runs, capsys, step, saved
):
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        stopped_at_step(patch, step)
        train(path)
    said = f"stopped; {saved} of 3 epochs are saved; run this cell again to go on"
    assert str(caught.value) == said and caught.value._render_traceback_() == [said]
    assert isinstance(caught.value, KeyboardInterrupt)  # `except Exception` does not catch it
    assert (path.read_bytes() if saved else path.exists()) == (saved and runs[saved - 1])
    train(path)
    assert path.read_bytes() == runs[2]
    assert ("goes on after epoch 1 of 3" in capsys.readouterr().out) == bool(saved)


def test_the_stop_button_counts_what_was_saved_not_what_was_done(path, monkeypatch):
    stopped_at_step(monkeypatch, 8)
    with pytest.raises(Stopped, match="stopped; 0 of 3 epochs are saved;"):
        train(path, save_every=1e9)
    stopped_at_step(monkeypatch, 8)
    with pytest.raises(Stopped, match="stopped; nothing is saved;"):
        fit(tiny_model(), tiny_data(), tiny_profile())


def facts(**changes):
    given = {"model": tiny_model(), "data": tiny_data(), "profile": tiny_profile()} | changes
    return training.training_facts(**given)


def test_a_training_follows_from_settings_networks_and_images():
    settings = {
        "lr": 0.2, "epochs": 4, "precision": "bfloat16", "schedule": "cosine", "batch_size": 9,
        "momentum": 0.8, "nesterov": True, "weight_decay": 0, "crop_padding": 4, "flip": False,
        "seed": 2,
    }  # fmt: skip
    for name, value in settings.items():
        assert facts(profile=tiny_profile(**{name: value})) != facts(), name
    others = {
        "l1_lambda": {"l1_lambda": 0.5},
        "cfg": {"model": VGG([3, 5], num_classes=3)},
        "starts_from": {"model": tiny_model(seed=9)},
        "images": {"data": tiny_data(seed=9)},
        "teacher": {"teacher": tiny_model(seed=5)},
    }
    for name, changes in others.items():
        assert facts(**changes).get(name) != facts().get(name), name
    assert facts(teacher=tiny_model(seed=5)) != facts(teacher=tiny_model(seed=6))


def test_a_training_does_not_follow_from_what_comes_after_it():
    profile = tiny_profile(name="other", test_batch_size=10, pruning_ratios=(0.3,))
    assert facts(profile=profile) == facts()


@pytest.mark.parametrize("done", [1, 3])
def test_a_file_made_with_other_settings_is_not_gone_on_with(path, runs, done):
    path.write_bytes(runs[done - 1])
    with pytest.raises(CheckpointError) as caught:
        train(path, profile=tiny_profile(lr=0.2, seed=2))
    said = [str(path), "lr = 0.1, now 0.2", "seed = 1, now 2", "run_name"]
    assert all(part in str(caught.value) for part in said)
    assert path.read_bytes() == runs[done - 1]


def written_out(model, l1_lambda):
    for bn in bn_layers(model):
        bn.weight.grad += l1_lambda * torch.sign(bn.weight.detach())


def first_layer_only(model, l1_lambda):
    gamma = bn_layers(model)[0].weight
    gamma.grad += l1_lambda * gamma.detach().sign()


def of_beta_too(model, l1_lambda):
    written_out(model, l1_lambda)
    for bn in bn_layers(model):
        bn.bias.grad += l1_lambda


def test_what_the_penalty_does_makes_the_training_not_how_it_is_written():
    assert facts(penalty=written_out, l1_lambda=0.1) == facts(l1_lambda=0.1)
    for mistaken in (first_layer_only, of_beta_too):
        assert facts(penalty=mistaken, l1_lambda=0.1) != facts(l1_lambda=0.1)


def test_two_trainings_never_write_one_file(path, runs):
    with one_at_a_time(path), pytest.raises(InUse, match=r"x\.safetensors: another"):
        train(path)
    assert not path.exists()


@pytest.mark.parametrize("l1_lambda", [-1e-9, math.nan, math.inf])
def test_a_lambda_that_makes_no_sense_is_refused_before_any_work(path, monkeypatch, l1_lambda):
    monkeypatch.setattr(TrainStep, "__init__", None)
    with pytest.raises(ValueError, match=rf"l1_lambda = {l1_lambda}"):
        train(path, l1_lambda=l1_lambda)
    assert not path.exists()


@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_model_with_other_classes_than_the_data_is_refused(monkeypatch, num_classes):
    monkeypatch.setattr(TrainStep, "__init__", None)
    with pytest.raises(ValueError, match=rf"num_classes = {num_classes}.* 3 classes"):
        fit(tiny_model(num_classes=num_classes), tiny_data(), tiny_profile())


def poisoned_by_the_last_step(monkeypatch):
    read = TrainStep.read

    def poison(step):
        step.model.feature[1].bias.data[0] = -math.inf  # which no loss sees
        return read(step)

    monkeypatch.setattr(TrainStep, "read", poison)


def infinite_test_loss(monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: Evaluation(math.inf, 10.0, 1, 10))


def exploded(monkeypatch):
    monkeypatch.setattr(TrainStep, "read", lambda _: (100.1 * math.log(3), 40.0))


def no_number(monkeypatch):
    monkeypatch.setattr(TrainStep, "read", lambda _: (math.nan, 40.0))


@pytest.mark.parametrize(
    "wrong", [poisoned_by_the_last_step, infinite_test_loss, exploded, no_number]
)
def test_a_run_that_diverges_stops_in_its_first_epoch(path, monkeypatch, wrong):
    wrong(monkeypatch)
    with pytest.raises(DivergenceError, match=r"epoch 1\b.*λ = 0\.25 and lr = 0\.1\."):
        train(path, l1_lambda=0.25)
    assert not path.exists()


def test_a_loss_that_is_only_large_goes_on(monkeypatch):
    monkeypatch.setattr(TrainStep, "read", lambda _: (99.9 * math.log(3), 40.0))
    assert len(fit(tiny_model(), tiny_data(), tiny_profile(epochs=1))) == 1


def test_after_a_divergence_the_last_sound_epoch_is_still_there(path, monkeypatch, runs):
    rate = training.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", lambda p, e: rate(p, e) if e < 2 else 1e9)
        with pytest.raises(DivergenceError, match=r"epoch 3\b.*lr = 1e\+09"):
            train(path)
    assert path.read_bytes() == runs[1]
    train(path)  # with the cause gone it goes on
    assert path.read_bytes() == runs[2]


@pytest.mark.parametrize("task", [fit, seconds_per_epoch])
def test_a_gpu_too_small_for_the_batch_is_told_by_the_batch_size(monkeypatch, task):
    def too_much(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainStep, "__call__", too_much)
    with pytest.raises(MemoryError, match="batch_size = 10: too large"):
        task(tiny_model(), tiny_data(), tiny_profile())


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
