"""What the notebooks compare: one row of a table for each network, cut, floor or way to train."""

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev

from tqdm import tqdm

from models.vgg import VGG
from utils.choosing import Verdict
from utils.cost import file_size, macs, num_parameters
from utils.images.data import ImageData
from utils.profile import Profile
from utils.pruning import PruningPlan
from utils.repair import RUNGS, slim_repaired, slim_rungs
from utils.run.deployment import EAGER, IMAGES, Files
from utils.run.identity import Run
from utils.run.lab import Trained, images_of, plan_cut
from utils.run.tuning import Start, finetune
from utils.run.workers import in_workers, workers_for
from utils.sparsity import bn_layers
from utils.training import Evaluation, evaluate

Tested = Callable[[VGG], Evaluation]  # a network on the test images


def verdicts(
    networks: Mapping[float, Trained], choices: Mapping[float, tuple[float, dict[float, Verdict]]]
) -> list[dict]:
    """A row for each λ: what speaks for and against cutting its network by each ratio."""
    return [
        {"λ": k, "training accuracy (%)": history.train_accuracy[-1]}
        | {
            f"to cut {100 * ratio:g}%": reasons[k].reason + (" ← this one" if k == chosen else "")
            for ratio, (chosen, reasons) in choices.items()
        }
        for k, (_, history) in networks.items()
    ]


def _size(network: VGG, input_shape: tuple[int, int, int]) -> dict[str, float]:
    work, kilobytes = macs(network, input_shape) / 1e6, file_size(network) / 1e3
    return {"parameters": num_parameters(network), "MACs (M)": work, "file (kB)": kilobytes}


def costs(networks: Mapping[str, VGG], input_shape: tuple[int, int, int]) -> list[dict]:
    """Parameters, MACs and file size of each of `networks`, and the shares of the first one's."""
    sizes = {name: _size(network, input_shape) for name, network in networks.items()}
    whole, units = next(iter(sizes.values())), {"parameters": "parameters", "MACs": "MACs (M)"}
    return [
        {"network": name, **size}
        | {f"{what} left": f"{size[unit] / whole[unit]:.2%}" for what, unit in units.items()}
        for name, size in sizes.items()
    ]


def ladder(
    run: Run, data: ImageData, network: VGG, ratios: Sequence[float], batches: list, test: list
) -> dict[str, list[float]]:
    """Test accuracy in % at each rung, for each of `ratios`; BN is recalibrated on `batches`."""
    cuts = (slim_rungs(network, plan_cut(run, data, network, ratio), batches) for ratio in ratios)
    tested = [{rung: evaluate(slim, test).accuracy for rung, slim in cut.items()} for cut in cuts]
    return {rung: [accuracies[rung] for accuracies in tested] for rung in RUNGS}


def beta_in_place(
    run: Run, data: ImageData, network: VGG, ratios: Sequence[float], test: list
) -> list[float]:
    """Test accuracy in % with γ of the channels to go at 0: each sends the constant relu(β)."""
    accuracies = []
    for ratio in ratios:
        constant, plan = copy.deepcopy(network), plan_cut(run, data, network, ratio)
        for bn, keep in zip(bn_layers(constant), plan.cfg_mask, strict=True):
            bn.weight.data[~keep.to(bn.weight.device)] = 0
        accuracies.append(evaluate(constant, test).accuracy)
    return accuracies


def repaired_cuts(
    data: ImageData, network: VGG, plans: Mapping[object, PruningPlan], batches: list,
    judges: Mapping[str, list],
) -> list[dict]:  # fmt: skip
    """A row for each of `plans`, by its name: what is left of `network`, and its accuracy in %,
    cut and repaired, on the images of each of `judges`, which names a column."""
    slims = {name: slim_repaired(network, plan, batches) for name, plan in plans.items()}
    rows = costs({"whole": network} | slims, data.input_shape)[1:]
    for row, plan, slimmed in zip(rows, plans.values(), slims.values(), strict=True):
        row |= {"channels left": f"{1 - plan.realised_ratio:.2%}"}
        row |= {"Σ|γ| cut": f"{plan.mass_cut:.2%}"}
        row |= {name: evaluate(slimmed, images).accuracy for name, images in judges.items()}
    return rows


def cut_row(
    run: Run, plan: PruningPlan, ratio: float, l1_lambda: float, tested: Mapping[str, Evaluation]
) -> dict:
    """What results.json keeps of a cut and of the network at each rung, `tested`."""
    asked = {"l1_lambda": l1_lambda, "pruning_ratio": ratio, "realised_ratio": plan.realised_ratio}
    how = {"min_channels": run.profile.min_channels, "threshold": plan.threshold, "cfg": plan.cfg}
    accuracies = {rung: evaluation.accuracy for rung, evaluation in tested.items()}
    return asked | how | accuracies | {"evaluations": {k: e._asdict() for k, e in tested.items()}}


def ways_to_finetune(
    run: Run, data: ImageData, ways: Mapping[str, tuple[VGG, Profile]], seeds: int, teacher: VGG,
    tested: Tested,
) -> list[dict]:  # fmt: skip
    """A row for each of `ways`, a start and how it is trained: mean and deviation over `seeds`,
    sorted by the accuracy reached. All are independent: as many processes as cores do them."""
    device, teacher = str(data.train_images.device), copy.deepcopy(teacher).cpu()
    jobs = {
        (name, seed): (run, device, copy.deepcopy(start).cpu(), replace(how, seed=seed), teacher)
        for name, (start, how) in sorted(ways.items(), key=lambda way: -way[1][1].epochs)
        for seed in range(run.profile.seed, run.profile.seed + seeds)
    }
    reached = {name: [] for name in ways}
    done = in_workers(_tuned, jobs, workers=workers_for(device))
    for (name, _), accuracy in tqdm(done, total=len(jobs), leave=False, file=sys.stdout):
        if isinstance(accuracy, Exception):
            raise accuracy
        reached[name].append(accuracy)
    rows = [
        {"way": name, "before (%)": tested(start).accuracy}
        | {"fine-tuned (%)": mean(reached[name])}
        | {"± (standard deviation)": stdev(reached[name]) if seeds > 1 else None, "seeds": seeds}
        for name, (start, _) in ways.items()
    ]
    return sorted(rows, key=lambda row: row["fine-tuned (%)"])


def _tuned(job: tuple[Run, str, VGG, Profile, VGG]) -> float:
    """Test accuracy in % of one way with one seed, in a worker that prints nothing."""
    run, device, start, how, teacher = job
    with contextlib.redirect_stdout(io.StringIO()):
        data = images_of(run, device)
        start, teacher = start.to(device), teacher.to(device)
        return finetune(run, data, start, profile=how, teacher=teacher).history.test_accuracy[-1]


def every_stage(
    run: Run, data: ImageData, networks: Mapping[float, Trained], starts: Mapping[str, Start],
    finetuned: Mapping[str, Trained], tested: Tested,
    in_int8: Mapping[str, float], speed: Sequence[dict], files: Files,
) -> list[dict]:  # fmt: skip
    """A row for each network of the lab, in the order in which they came about: dense, sparse,
    slim, finetuned. "dense" and the names of `starts` say which are equally large and fast."""
    latency = {(s["network"], s["images"]): s["ms"] for s in speed if s["runtime"] == EAGER}

    def row(stage: str, shape: str, k: float | None, network: VGG, epochs: int | None, raw=None):
        of = "" if k is None or stage == "dense" else f" λ={k:g}"
        return {
            "network": f"{stage}{of}" + ("" if shape == "dense" else f", {shape}"),
            "stage": stage,
            "epochs so far": epochs,
            "raw cut (%)": raw,
            "test accuracy (%)": tested(network).accuracy,
            "int8 (%)": in_int8.get(shape) if stage in ("dense", "finetuned") else None,
            **_size(network, data.input_shape),
            **{f"batch of {size} (ms)": latency[shape, size] for size in IMAGES.values()},
            **{f"{k} (kB)": f.stat().st_size / 1e3 for k, f in files.get(shape, {}).items()},
        }

    once, more, weakest = run.profile.epochs, run.profile.finetune_epochs, min(networks)
    cut = sorted({s.l1_lambda for s in starts.values() if s.l1_lambda} - {weakest})
    return [
        row("dense", "dense", weakest, networks[weakest].model, once),
        *(row("sparse", "dense", k, networks[k].model, once) for k in cut),
        *(row("slim", k, s.l1_lambda, s.network, s.epochs, s.raw_cut) for k, s in starts.items()),
        *(
            row("finetuned", k, s.l1_lambda, finetuned[k].model, s.epochs and s.epochs + more)
            for k, s in starts.items()
        ),
    ]


def tuned_rows(
    starts: Mapping[str, Start], finetuned: Mapping[str, Trained], tested: Tested
) -> list[dict]:
    """What results.json keeps of each fine-tuning."""
    return [
        {"network": name, "pruning_ratio": starts[name].pruning_ratio, "cfg": model.cfg}
        | {**vars(history), "test": tested(model)._asdict()}
        for name, (model, history) in finetuned.items()
    ]
