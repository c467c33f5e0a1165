"""Tables of networks: every number at its place, from records in which no two are alike."""

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_data, tiny_model, tiny_profile

from models.vgg import VGG
from utils.choosing import Verdict
from utils.cost import file_size
from utils.pruning import PruningPlan, plan_pruning, slim
from utils.repair import RUNGS, absorb_bias, recalibrate_bn, slim_repaired
from utils.run import comparison, deployment
from utils.run.identity import Run
from utils.run.lab import Trained
from utils.run.tuning import Start
from utils.store.checkpoint import History, load
from utils.training import Evaluation, evaluate

DATA = dataclasses.replace(
    tiny_data(),
    classes=("a", "b", "c", "d"),
    test_labels=torch.tensor([0, *2 * [1], *3 * [2], *4 * [3]]),
)
SHAPE = DATA.input_shape
TEST = list(DATA.plain_batches("test", 10))


def on_test(network: VGG) -> Evaluation:
    return evaluate(network, TEST)


BATCHES = list(DATA.plain_batches("train", 13))
RUN = Run(
    tiny_profile(name="tiny", epochs=5, finetune_epochs=3, min_channels=2, seed=7),
    {"digest": DATA.digest},
)


def history(seed: float = 0.0) -> History:
    """Three epochs, of which neither accuracy is best in the last one."""
    columns = {name: [k + seed, k + 0.5 + seed, k + 0.25 + seed] for k, name in
               enumerate(vars(History()), 1)}  # fmt: skip
    return History(**columns)


def network(seed: int, *cfg: int | str) -> VGG:
    return tiny_model(seed, 4, list(cfg) or [3, 4, "M", 5]).eval()


def always(label: int, model: VGG | None = None) -> VGG:
    """A network that answers `label` whatever it sees: right on 10, 20, 30 or 40 % of the tests."""
    model = model or network(label)
    model.classifier.bias.data[label] += 1e6
    return model


@pytest.fixture
def by_logits(monkeypatch):
    """In place of an accuracy, a number that no two networks share."""

    def score(model: VGG, *_) -> float:
        with torch.no_grad():
            return model.eval()(DATA.test_images.float() / 255)[:, 0].sum().item()

    monkeypatch.setattr(comparison, "evaluate", lambda *of: SimpleNamespace(accuracy=score(*of)))
    return score


# --- what notebook 2 compares --------------------------------------------------------------------


def test_a_verdict_stands_under_its_ratio_beside_its_lambda():
    networks = {0.0: Trained(None, history()), 0.3: Trained(None, history(0.125))}
    choices = {
        0.5: (0.0, {0.0: Verdict(True, "a"), 0.3: Verdict(False, "b")}),
        0.9: (0.3, {0.0: Verdict(False, "c"), 0.3: Verdict(True, "d")}),
    }
    assert comparison.verdicts(networks, choices) == [
        {"λ": 0.0, "training accuracy (%)": 3.25, "to cut 50%": "a ← this one", "to cut 90%": "c"},
        {"λ": 0.3, "training accuracy (%)": 3.375, "to cut 50%": "b", "to cut 90%": "d ← this one"},
    ]


def test_costs_are_counted_and_compared_with_the_first():
    wide, narrow = network(0), network(0, 3, "M", 2)
    first, second = comparison.costs({"dense": wide, "slim": narrow}, SHAPE)
    # Convolutions 3·3·9, 3·4·9 and 4·5·9, γ and β of 12 channels, the classifier 5·4 + 4.
    assert (first["network"], first["parameters"]) == ("dense", 81 + 108 + 180 + 24 + 24)
    assert second["parameters"] == 81 + 54 + 10 + 12
    macs = (81 + 108) * 32 * 32 + 180 * 16 * 16 + 20, 81 * 32 * 32 + 54 * 16 * 16 + 8
    assert [row["MACs (M)"] for row in (first, second)] == [n / 1e6 for n in macs]
    assert first["parameters left"] == first["MACs left"] == "100.00%"
    assert second["parameters left"] == f"{100 * 157 / 417:.2f}%"
    assert second["MACs left"] == f"{100 * macs[1] / macs[0]:.2f}%"
    assert second["file (kB)"] == file_size(narrow) / 1000


def test_the_ladder_tests_each_rung_at_each_ratio(by_logits):
    model = network(3, 8, "M", 12)
    ratios = [0.3, 0.6]
    found = comparison.ladder(RUN, DATA, model, ratios, BATCHES, TEST)
    assert list(found) == list(RUNGS)
    for k, ratio in enumerate(ratios):
        plan = plan_pruning(model, ratio, min_channels=2)
        raw, absorbed = slim(model, plan), slim(absorb_bias(model, plan), plan)
        rungs = raw, absorbed, recalibrate_bn(raw, BATCHES), recalibrate_bn(absorbed, BATCHES)
        assert [found[name][k] for name in RUNGS] == [*map(by_logits, rungs)]


def test_with_gamma_off_and_beta_in_place_a_channel_sends_its_constant(by_logits):
    model = network(3, 8, "M", 12)
    model.feature[1].bias.data += torch.linspace(-1, 1, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan, by_hand = plan_pruning(model, 0.4, min_channels=2), network(0, 8, "M", 12)
    by_hand.load_state_dict(before)
    for (_, bn), keep in zip(by_hand.blocks(), plan.cfg_mask, strict=True):
        bn.weight.data *= keep
    found = comparison.beta_in_place(RUN, DATA, model, [0.4], TEST)
    assert found == [by_logits(by_hand)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_cuts_are_compared_by_what_is_left_and_on_the_images_asked_for():
    model = network(3, 8, "M", 12)
    for k, (_, bn) in enumerate(model.blocks()):
        bn.weight.data = torch.linspace(0.1, 1 + k, len(bn.weight))
    plans = {name: plan_pruning(model, ratio, min_channels=2)
             for name, ratio in (("light", 0.25), ("hard", 0.75))}  # fmt: skip
    judges = {"on test (%)": TEST, "on training (%)": BATCHES}
    rows = comparison.repaired_cuts(DATA, model, plans, BATCHES, judges)
    assert [row["network"] for row in rows] == ["light", "hard"]
    assert [row["channels left"] for row in rows] == ["75.00%", "25.00%"]
    for row, plan in zip(rows, plans.values(), strict=True):
        first, last = (v for v in plan.cfg if v != "M")
        left = 27 * first + 9 * first * last + 2 * (first + last) + 4 * last + 4
        assert row["parameters left"] == f"{100 * left / (216 + 864 + 40 + 52):.2f}%"
        work = 27 * first * 1024 + 9 * first * last * 256 + 4 * last
        assert row["MACs left"] == f"{100 * work / (216 * 1024 + 864 * 256 + 48):.2f}%"
        gone = [(bn.weight * ~m).sum() for (_, bn), m in
                zip(model.blocks(), plan.cfg_mask, strict=True)]  # fmt: skip
        total = sum(bn.weight.sum() for _, bn in model.blocks())
        assert row["Σ|γ| cut"] == f"{100 * (sum(gone) / total).item():.2f}%"
        repaired = slim_repaired(model, plan, BATCHES)
        for name, images in judges.items():
            assert row[name] == evaluate(repaired, images).accuracy


def test_what_is_kept_of_a_cut_is_plain_and_at_its_place():
    masks = [torch.tensor([True, False, True]), torch.tensor([False, True])]
    plan = PruningPlan(0.4, 0.0625, [2, "M", 1], masks, mass_cut=0.3)
    tested = {name: Evaluation(loss, accuracy, 7, 10) for name, loss, accuracy in
              (("before the cut", 1.5, 80.0), ("raw cut", 2.5, 20.0))}  # fmt: skip
    row = comparison.cut_row(RUN, plan, 0.45, 0.01, tested)
    assert json.loads(json.dumps(row)) == {
        "l1_lambda": 0.01, "pruning_ratio": 0.45, "realised_ratio": 0.4, "min_channels": 2,
        "threshold": 0.0625, "cfg": [2, "M", 1], "before the cut": 80.0, "raw cut": 20.0,
        "evaluations": {name: e._asdict() for name, e in tested.items()},
    }  # fmt: skip
    assert row["evaluations"]["raw cut"]["loss"] == 2.5


# --- what notebook 3 compares --------------------------------------------------------------------


def test_each_way_has_its_start_its_mean_and_the_deviation_of_a_sample(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weak, strong = always(0), always(2)
    usual = RUN.profile.for_finetuning()
    ways = {"good": (weak, usual), "poor": (strong, dataclasses.replace(usual, lr=0.5))}
    asked = {}

    def in_workers(call, jobs, *, workers):
        asked.update(jobs)
        reached = {("good", 7): 90.0, ("good", 8): 96.0, ("poor", 7): 70.0, ("poor", 8): 71.0}
        return reversed([(key, reached[key]) for key in jobs])

    monkeypatch.setattr(comparison, "in_workers", in_workers)
    rows = comparison.ways_to_finetune(RUN, DATA, ways, 2, network(9), on_test)
    deviation = "± (standard deviation)"
    assert [list(row.values()) for row in rows] == [
        ["poor", pytest.approx(30.0), 70.5, pytest.approx(0.5**0.5), 2],
        ["good", pytest.approx(10.0), 93.0, pytest.approx(18**0.5), 2],
    ]
    assert list(rows[0]) == ["way", "before (%)", "fine-tuned (%)", deviation, "seeds"]
    assert {key: job[3].seed for key, job in asked.items()} == {key: key[1] for key in asked}
    assert {job[3].lr for key, job in asked.items() if key[0] == "poor"} == {0.5}

    def fails(call, jobs, *, workers):
        return [(("good", 1), ValueError("no memory"))]

    monkeypatch.setattr(comparison, "in_workers", fails)
    with pytest.raises(ValueError, match="no memory"):
        comparison.ways_to_finetune(RUN, DATA, ways, 1, network(9), on_test)


def test_a_way_is_trained_with_its_teacher_and_comes_to_its_last_accuracy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "images_of", lambda run, device: DATA)

    def in_workers(call, jobs, *, workers):
        return [(key, call(pickle.loads(pickle.dumps(job)))) for key, job in jobs.items()]

    monkeypatch.setattr(comparison, "in_workers", in_workers)
    usual = dataclasses.replace(RUN.profile.for_finetuning(), lr=0.5, distillation=0.0)
    ways = {
        "alone": (network(1), usual),
        "taught": (network(1), dataclasses.replace(usual, distillation=0.9)),
    }
    rows = comparison.ways_to_finetune(RUN, DATA, ways, 1, network(2), on_test)
    rows = {row["way"]: row for row in rows}
    assert all(row["± (standard deviation)"] is None and row["seeds"] == 1 for row in rows.values())
    files = [load(file) for file in Path("checkpoints/tiny").glob("finetuned_*")]
    last = {"teacher" in f.settings: f.history["test_accuracy"][-1] for f in files}
    assert last == {False: rows["alone"]["fine-tuned (%)"], True: rows["taught"]["fine-tuned (%)"]}
    assert {f.settings["seed"] for f in files} == {7}


def stages(tmp_path: Path) -> list[dict]:
    """The table of two λ, a cut of 50 % and a network from elsewhere."""
    dense, sparse, tuned, elsewhere = always(0), always(1), always(3), network(7)
    slimmed = always(2, network(2, 2, "M", 3))
    networks = {0.0: Trained(dense, history()), 0.02: Trained(sparse, history())}
    starts = {"50% pruned": Start(slimmed, 0.02, 7, 0.5, 12.5), "from elsewhere": Start(elsewhere)}
    finetuned = {
        "50% pruned": Trained(tuned, history()),
        "from elsewhere": Trained(dense, history()),
    }
    speed = [
        {"network": name, "runtime": runtime, "images": n, "ms": ms * n, "IQR (ms)": 0.1}
        for name, eager in (("dense", 8.0), ("50% pruned", 2.0), ("from elsewhere", 4.0))
        for n in (1, 256)
        for runtime, ms in (("eager float32", eager), ("ONNX int8", eager / 16))
    ]
    sizes = {"float": 3000, "int": 1000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    paths = {"ONNX float32": tmp_path / "float", "ONNX int8": tmp_path / "int"}
    in_int8 = {"dense": 55.5, "50% pruned": 44.5}
    return comparison.every_stage(
        RUN, DATA, networks, starts, finetuned, on_test, in_int8, speed, {"50% pruned": paths}
    )


def test_every_stage_has_its_own_numbers(tmp_path):
    rows = stages(tmp_path)
    by_name = {row["network"]: row for row in rows}
    assert list(by_name) == [
        "dense", "sparse λ=0.02", "slim λ=0.02, 50% pruned", "slim, from elsewhere",
        "finetuned λ=0.02, 50% pruned", "finetuned, from elsewhere",
    ]  # fmt: skip
    dense, sparse, slimmed, _, tuned, _ = rows
    assert [r["epochs so far"] for r in rows] == [5, 5, 7, None, 10, None]
    assert [r["raw cut (%)"] for r in rows] == [None, None, 12.5, None, None, None]
    assert [r["int8 (%)"] for r in rows] == [55.5, None, None, None, 44.5, None]
    assert [r["batch of 1 (ms)"] for r in rows] == [8, 8, 2, 4, 2, 4]
    assert [r["batch of 256 (ms)"] for r in rows] == [2048, 2048, 512, 1024, 512, 1024]
    found = [r["test accuracy (%)"] for r in (dense, sparse, slimmed, tuned)]
    assert found == pytest.approx([10.0, 20.0, 30.0, 40.0])
    assert [r["stage"] for r in rows] == ["dense", "sparse", *2 * ["slim"], *2 * ["finetuned"]]
    assert (tuned["ONNX float32 (kB)"], tuned["ONNX int8 (kB)"]) == (3.0, 1.0)
    assert "ONNX int8 (kB)" not in dense
    assert slimmed["parameters"] == 54 + 54 + 10 + 16


def test_what_is_kept_of_a_fine_tuning_is_at_its_place():
    model = network(1)
    tested = {model: Evaluation(0.75, 66.0, 7, 10)}
    starts = {"50% pruned": Start(model, 0.02, 7, 0.5)}
    tuned = {"50% pruned": Trained(model, history())}
    (row,) = comparison.tuned_rows(starts, tuned, tested.__getitem__)
    assert (row["network"], row["pruning_ratio"], row["cfg"]) == ("50% pruned", 0.5, model.cfg)
    assert row["test"] == tested[model]._asdict()
    assert {name: row[name] for name in vars(history())} == vars(history())
    json.dumps(row)


# --- taken along ---------------------------------------------------------------------------------

SPEED = [
    {"network": name, "runtime": runtime, "images": n, "ms": ms, "IQR (ms)": ms / 8}
    for name, runtime, n, ms in (
        ("dense", "eager float32", 1, 24.0),
        ("slim", "eager float32", 1, 8.0),
        ("dense", "ONNX int8", 1, 6.0),
        ("slim", "ONNX int8", 1, 1.5),
        ("dense", "eager float32", 256, 1000.0),
        ("slim", "eager float32", 256, 200.0),
        ("dense", "ONNX int8", 256, 400.0),
        ("slim", "ONNX int8", 256, 50.0),
    )
]


def test_gains_are_told_in_all_and_by_pruning():
    assert [list(row.values()) for row in deployment.gains(SPEED)] == [
        ["dense", "eager float32", "1.0 ×", "1.0 ×", "1.0 ×", "1.0 ×"],
        ["slim", "eager float32", "3.0 ×", "3.0 ×", "5.0 ×", "5.0 ×"],
        ["dense", "ONNX int8", "4.0 ×", "1.0 ×", "2.5 ×", "1.0 ×"],
        ["slim", "ONNX int8", "16.0 ×", "4.0 ×", "20.0 ×", "8.0 ×"],
    ]
    assert list(deployment.gains(SPEED)[0])[2:] == [
        "1 image, in all", "1 image, by pruning", "256 images, in all", "256 images, by pruning",
    ]  # fmt: skip


def test_points_have_the_seconds_of_one_image_and_the_accuracy_of_their_runtime():
    found = deployment.points(SPEED, {"dense": 91.0, "slim": 89.0}, {"dense": 90.5, "slim": 88.0})
    assert [[*point.values()] for point in found] == [
        ["dense", "eager float32", 91.0, 0.024, 0.003],
        ["slim", "eager float32", 89.0, 0.008, 0.001],
        ["dense", "ONNX int8", 90.5, 0.006, 0.00075],
        ["slim", "ONNX int8", 88.0, 0.0015, 0.0001875],
    ]


def test_latencies_are_milliseconds_of_each_network_and_number_of_images(monkeypatch):
    def take_turns(steps, min_run_time):
        return {key: SimpleNamespace(median=0.5 + k, iqr=0.25) for k, key in enumerate(steps)}

    monkeypatch.setattr(deployment, "take_turns", take_turns)
    rows = deployment.latencies({"dense": network(0), "slim": network(1)}, {}, DATA)
    assert [[*row.values()] for row in rows] == [
        ["dense", "eager float32", 1, 500.0, 250.0],
        ["slim", "eager float32", 1, 1500.0, 250.0],
        ["dense", "eager float32", 256, 2500.0, 250.0],
        ["slim", "eager float32", 256, 3500.0, 250.0],
    ]


def test_what_int8_loses_is_said_and_what_can_not_be_exported_is_left_out(monkeypatch, capsys):
    export = deployment.export
    monkeypatch.setattr(export, "export_onnx", lambda *_, **__: None)
    monkeypatch.setattr(export, "check_parity", lambda *_: 2e-6)
    monkeypatch.setattr(export, "quantize_int8", lambda *_: None)
    monkeypatch.setattr(export, "session", lambda file, **_: file.stem)
    monkeypatch.setattr(
        export, "accuracy", lambda s, _: {"dense_int8": 80.0, "slim_50_int8": 77.0}[s]
    )
    networks = {"dense": network(0), "50% pruned": network(1)}
    accuracy = {"dense": 80.25, "50% pruned": 78.0}
    files, in_int8 = deployment.take_along(RUN, DATA, networks, accuracy, BATCHES, TEST)
    assert in_int8 == {"dense": 80.0, "50% pruned": 77.0}
    assert files["50% pruned"] == {
        "ONNX float32": Path("figures/tiny/slim_50.onnx"),
        "ONNX int8": Path("figures/tiny/slim_50_int8.onnx"),
    }
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("int8 loses 0.25 points") and "2e-06" in first
    assert "int8 loses 1.00 points  ← more than half a point lost" in second

    def refuses(*_, **__):
        raise export.ExportError("onnx is missing")

    monkeypatch.setattr(export, "export_onnx", refuses)
    assert deployment.take_along(RUN, DATA, networks, accuracy, BATCHES, TEST) == ({}, {})
    assert capsys.readouterr().out == "left out: onnx is missing\n"
