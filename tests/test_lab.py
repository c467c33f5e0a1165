"""The steps of the lab: each loads what is done, and names what is missing or foreign."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tiny import same, tiny_data, tiny_model, tiny_profile
from torch import nn

from models.vgg import VGG
from utils.pruning import plan_pruning
from utils.repair import slim_repaired
from utils.run import lab, tuning
from utils.run.identity import Run, RunError, begin, open_run
from utils.store.checkpoint import Checkpoint, CheckpointError, load, save
from utils.store.identity import weights_digest
from utils.training import Stopped, fit

DATA = tiny_data()
LAMBDAS = (0.0, 0.02)


def profile(**changes):
    fields = {"name": "tiny", "depth": 11, "width": 0.03, "l1_lambdas": LAMBDAS, "epochs": 1}
    fields |= {"finetune_epochs": 1, "distillation": 0.0, "pruning_ratios": (0.3, 0.6)}
    return tiny_profile(**fields | changes)


def cut_all(run: Run, networks: dict, l1_lambda: float = LAMBDAS[1]) -> None:
    """What vggprune.ipynb does."""
    model = networks[l1_lambda].model
    for ratio in run.profile.pruning_ratios:
        plan = plan_pruning(model, ratio, min_channels=run.profile.min_channels)
        slimmed = slim_repaired(model, plan, DATA.plain_batches("train", 26))
        lab.save_slim(run, DATA, model, l1_lambda, ratio, slimmed, {"raw cut": 12.5})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A lab in which every λ is trained and every ratio cut."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = begin(profile(), DATA, "cpu")
        cut_all(run, {k: lab.train(run, DATA, k) for k in LAMBDAS})
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Run:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return open_run("tiny")


def files() -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in Path("checkpoints").glob("*/*.safetensors")}


# --- training ------------------------------------------------------------------------------------


def test_every_lambda_starts_from_the_same_weights_and_is_trained_once(run, capsys):
    before = files()
    trained = {k: lab.train(run, DATA, k) for k in LAMBDAS}
    assert files() == before and capsys.readouterr().out.count("(done before)") == 2
    starts = {load(run.trained_file(k)).settings["starts_from"] for k in LAMBDAS}
    assert len(starts) == 1
    networks = lab.trained_networks(run, DATA)
    assert list(networks) == sorted(LAMBDAS)
    for k, (model, history) in networks.items():
        assert same(dict(model.state_dict()), dict(trained[k].model.state_dict()))
        assert history == trained[k].history and not model.training


def test_a_run_that_only_cuts_finds_what_was_trained(run):
    cut = open_run("tiny", save_as="other", min_channels=2)
    assert lab.trained_networks(cut, DATA).keys() == {*LAMBDAS}


def test_a_run_stopped_before_its_second_lambda_is_named(run):
    run.trained_file(0.02).unlink()
    with pytest.raises(RunError, match=r"tiny: .*trained_lambda_0\.02\.safetensors is missing"):
        lab.trained_networks(run, DATA)


@pytest.mark.parametrize("epochs", [4, 20])  # 20 is the default, which no file holds
def test_a_run_stopped_within_a_training_is_named(tmp_path, monkeypatch, epochs):
    monkeypatch.chdir(tmp_path)
    run = begin(profile(epochs=epochs, l1_lambdas=(0.1,)), DATA, "cpu")

    def stop(history):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.monotonic", iter(range(0, 10**6, 100)).__next__)  # a save is due
    with pytest.raises(Stopped):
        lab.train(run, DATA, 0.1, on_epoch=stop)
    said = rf"_0\.1\.s\w+: 1 of {epochs} epochs are done. Run sparsity_train"
    with pytest.raises(RunError, match=said):
        lab.trained_networks(run, DATA)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "seed = 7, now 1"),
        ({"lr": 0.2}, "lr = 0.2, now 0.1"),
        ({"width": 0.05}, "cfg = "),
        ({"precision": "bfloat16"}, "precision = 'bfloat16', now 'float32'"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v.split()[0],
)
def test_a_network_of_another_run_does_not_join(run, changes, said):
    other = begin(profile(name="other", **changes), DATA, "cpu")
    lab.train(other, DATA, 0.02)
    shutil.copy(other.trained_file(0.02), run.trained_file(0.02))
    with pytest.raises(RunError) as caught:
        lab.trained_networks(run, DATA)
    assert f"trained_lambda_0.02.safetensors was made with {said}" in str(caught.value)


def test_a_file_under_the_name_of_another_lambda_does_not_join(run):
    shutil.copy(run.trained_file(0.0), run.trained_file(0.02))
    with pytest.raises(RunError, match=r"0\.02\.s\w+ was made with l1_lambda = 0\.0, now 0\.02"):
        lab.trained_networks(run, DATA)


def test_other_images_than_those_trained_on_are_named(run):
    with pytest.raises(RunError, match=rf"on noise \({DATA.digest}\), now there are noise"):
        lab.train(run, tiny_data(seed=9), 0.02)
    with pytest.raises(RunError, match=rf"images = '{DATA.digest}', now"):
        lab.trained_networks(run, tiny_data(seed=9))


def test_a_run_that_began_on_a_gpu_goes_on_in_its_precision_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a CPU that has but float32
    auto = profile(precision="auto", epochs=2, l1_lambdas=(0.1,))
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        gpu.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        run = begin(auto, DATA, torch.device("cuda"))
    kept = []
    file = run.trained_file(0.1)
    monkeypatch.setattr("time.monotonic", iter(range(0, 10**6, 100)).__next__)
    lab.train(run, DATA, 0.1, on_epoch=lambda _: kept.append(file.read_bytes()))
    file.write_bytes(kept[0])
    capsys.readouterr()

    again = begin(auto, DATA, "cpu")
    assert again == run and "bfloat16 on a GPU" in str(again)
    lab.train(again, DATA, 0.1)
    assert "goes on after epoch 1 of 2" in (said := capsys.readouterr().out)
    assert "2/2" in said
    assert file.read_bytes() == kept[1]


# --- cutting -------------------------------------------------------------------------------------


def test_the_slim_networks_of_the_run_come_back(run):
    found = lab.slim_networks(run, DATA, lab.trained_networks(run, DATA))
    assert list(found) == [0.3, 0.6]
    assert all(c.results == {"raw cut": 12.5} for c in found.values())
    widths = [sum(v for v in c.cfg if v != "M") for c in found.values()]
    assert widths[0] > widths[1]


def slim_error(run: Run) -> str:
    with pytest.raises(RunError) as caught:
        lab.slim_networks(run, DATA, lab.trained_networks(run, DATA))
    assert str(caught.value).endswith("Run vggprune.ipynb to the end")
    return str(caught.value)


def test_a_cut_that_is_missing_is_named(run):
    Path("checkpoints/tiny/slim_0.6.safetensors").unlink()
    assert "checkpoints/tiny/slim_0.6.safetensors is missing" in slim_error(run)
    assert "slim_0.9.safetensors is missing" in slim_error(open_run(pruning_ratios=[0.3, 0.9]))


def test_a_cut_with_another_floor_is_named(run):
    said = slim_error(open_run(min_channels=2))
    assert "slim_0.3.safetensors was made with min_channels = 1, now 2" in said


def test_a_cut_under_the_name_of_another_ratio_is_named(run):
    shutil.copy("checkpoints/tiny/slim_0.3.safetensors", "checkpoints/tiny/slim_0.6.safetensors")
    assert "slim_0.6.safetensors was made with pruning_ratio = 0.3, now 0.6" in slim_error(run)


def test_a_cut_of_another_network_is_named(run):
    networks = lab.trained_networks(run, DATA)
    networks[0.02].model.classifier.bias.data += 1
    cut_all(run, networks)
    assert "slim_0.3.safetensors was made with cut_from = " in slim_error(run)


def test_each_ratio_may_be_cut_from_another_lambda(run):
    networks = lab.trained_networks(run, DATA)
    cut_all(dataclasses.replace(run, profile=profile(pruning_ratios=(0.3,))), networks, 0.0)
    found = lab.slim_networks(run, DATA, networks)
    assert [c.settings["l1_lambda"] for c in found.values()] == [0.0, 0.02]


def test_a_slim_file_from_elsewhere_is_named(run):
    file = Path("checkpoints/tiny/slim_0.3.safetensors")
    save(file, Checkpoint("slim", load(file).cfg, load(file).state_dict))
    assert "l1_lambda = None, now 0.0" in slim_error(run)


def test_a_cut_to_go_on_from_is_made_once(run):
    model = lab.trained_networks(run, DATA)[0.02].model
    plan = plan_pruning(model, 0.5)
    before = files()
    first = lab.cut_on(run, DATA, model, plan)
    made = files()
    again = lab.cut_on(run, DATA, model, plan)
    assert first.cfg == plan.cfg and same(dict(again.state_dict()), dict(first.state_dict()))
    assert files() == made and len(made) == len(before) + 1
    # BN is recalibrated on other images.
    lab.cut_on(dataclasses.replace(run, profile=profile(seed=9)), DATA, model, plan)
    model.feature[1].running_mean += 1  # another network
    lab.cut_on(run, DATA, model, plan)
    assert len(files()) == len(made) + 2


# --- training again ------------------------------------------------------------------------------


def test_each_way_of_fine_tuning_and_each_start_has_a_file_of_its_own(run):
    slims = lab.slim_networks(run, DATA, lab.trained_networks(run, DATA))
    start = slims[0.3].model()
    before, digest = files(), weights_digest(start)
    usual = run.profile.for_finetuning()
    ways = [
        (start, usual),
        (start, dataclasses.replace(usual, lr=0.01)),
        (start, dataclasses.replace(usual, seed=5)),
        (start, dataclasses.replace(usual, schedule="step")),
        (slims[0.6].model(), usual),
    ]
    tuned = [tuning.finetune(run, DATA, network, profile=how) for network, how in ways]
    made = files()
    assert len(made) == len(before) + 5
    assert weights_digest(start) == digest  # a copy was trained
    again = tuning.finetune(run, DATA, start)  # the run's own way
    assert files() == made and same(
        dict(again.model.state_dict()), dict(tuned[0].model.state_dict())
    )
    assert not again.model.training


def test_a_teacher_counts_only_where_the_profile_gives_it_a_weight(run):
    networks = lab.trained_networks(run, DATA)
    model, teacher = networks[0.02].model, networks[0.0].model
    usual = run.profile.for_finetuning()
    alone, ignored, taught = (
        tuning.finetune(run, DATA, model, profile=how, teacher=who).model.classifier.weight
        for how, who in (
            (usual, None),
            (usual, teacher),
            (dataclasses.replace(usual, distillation=0.9), teacher),
        )
    )
    assert torch.equal(alone, ignored) and not torch.equal(alone, taught)
    with pytest.raises(ValueError, match=r"distillation = 0\.9: needs a teacher"):
        tuning.finetune(run, DATA, model, profile=dataclasses.replace(usual, distillation=0.9))


def test_a_second_pass_counts_the_channels_that_the_first_has_cut(run):
    model = lab.trained_networks(run, DATA)[0.02].model

    def kept(network):
        return sum(v for v in network.cfg if v != "M")

    (_, first, _), (_, second, _) = tuning.in_passes(run, DATA, model, 0.5, [0.3, 0.6])
    assert kept(first) == kept(model) - round(0.3 * kept(model))
    assert kept(second) == kept(model) - round(0.6 * kept(model))
    alone = plan_pruning(model, 0.3, min_channels=run.profile.min_channels)
    repaired = slim_repaired(model, alone, lab.calibration(run, DATA))
    assert same(dict(first.state_dict()), dict(repaired.state_dict()))


def test_a_cut_of_other_images_is_named(run):
    networks = lab.trained_networks(run, DATA)
    other = dataclasses.replace(DATA, test_images=DATA.test_images.flip(0))
    with pytest.raises(RunError, match=r"slim_0\.3\.safetensors was made with images = "):
        lab.slim_networks(run, other, networks)


def test_between_two_passes_the_penalty_pulls_again(run):
    model = lab.trained_networks(run, DATA)[0.02].model
    again = tuning.train_again(run, DATA, model, run.profile, "pass", l1_lambda=0.5).model
    pulled, free = copy.deepcopy(model), copy.deepcopy(model)
    fit(pulled, DATA, run.profile, l1_lambda=0.5)
    fit(free, DATA, run.profile)
    assert same(dict(again.state_dict()), dict(pulled.state_dict()))
    assert not same(dict(again.state_dict()), dict(free.state_dict()))


def test_passes_cut_on_what_was_trained_again_after_the_cut_before(run):
    model = lab.trained_networks(run, DATA)[0.02].model
    passes = tuning.in_passes(run, DATA, model, 0.5, [0.3, 0.6])
    (first, one, untrained), (second, two, history) = passes
    assert (first, second, untrained, len(history)) == (0.3, 0.6, None, run.profile.epochs)
    again = tuning.train_again(run, DATA, one, run.profile, "pass", l1_lambda=0.5).model
    total, left = (sum(v for v in n.cfg if v != "M") for n in (model, again))
    of_those_left = 1 - (total - round(0.6 * total)) / left
    plan = plan_pruning(again, of_those_left, min_channels=run.profile.min_channels)
    by_hand = slim_repaired(again, plan, lab.calibration(run, DATA))
    assert same(dict(two.state_dict()), dict(by_hand.state_dict()))


def test_passes_that_the_floor_forbids_are_left_out_with_a_word(run, capsys):
    model = lab.trained_networks(run, DATA)[0.02].model
    run = open_run(min_channels=3)
    assert list(tuning.in_passes(run, DATA, model, 0.5, [0.3, 0.95])) == []
    assert "no passes: min_channels = 3 forbids 95%" in capsys.readouterr().out


def test_fresh_weights_have_the_same_shape_and_follow_from_the_seed():
    model, state = tiny_model(), torch.get_rng_state()
    one, same_one, other = (tuning.from_scratch(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.cfg == model.cfg and one.classifier.out_features == 3
    assert same(dict(one.state_dict()), dict(same_one.state_dict()))
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


# --- networks of others --------------------------------------------------------------------------


def test_a_network_from_elsewhere_is_fine_tuned_if_it_fits_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = VGG([4, "M", 6], num_classes=3)
    torch.save({"cfg": theirs.cfg, "state_dict": theirs.state_dict()}, "theirs.pth")
    for typed in ("theirs.pth", f" '{tmp_path}/theirs.pth' "):
        found = tuning.from_elsewhere(typed, DATA).network
        assert same(dict(found.state_dict()), dict(theirs.state_dict()))

    ten = VGG([4, "M", 6], num_classes=10)
    torch.save({"cfg": ten.cfg, "state_dict": ten.state_dict()}, "ten.pth")
    with pytest.raises(ValueError, match=r"lab_file = '/.*ten.pth': .*10 classes; .* have 3"):
        tuning.from_elsewhere("ten.pth", DATA)

    gray = VGG([4, "M", 6], num_classes=3)
    gray.feature[0] = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    torch.save({"cfg": gray.cfg, "state_dict": gray.state_dict()}, "gray.pth")
    with pytest.raises(CheckpointError, match=r"gray\.pth.*feature\.0\.weight"):
        tuning.from_elsewhere("gray.pth", DATA)


@pytest.mark.parametrize(("count", "sizes"), [(450, [200, 250]), (5200, [200] * 25)])
def test_bn_is_recalibrated_on_the_first_batches_of_an_epoch_of_training(
    count, sizes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data, how = tiny_data(count=count), tiny_profile(seed=1)
    found = lab.calibration(begin(how, data, "cpu", remember=False), data)
    assert [len(labels) for _, labels in found] == sizes
    options = {"seed": 1, "crop_padding": how.crop_padding, "flip": how.flip}
    epoch = data.train_batches(200, epoch=0, **options)
    for (x, y), (images, labels) in zip(found, epoch, strict=False):
        assert torch.equal(x, images) and torch.equal(y, labels)
