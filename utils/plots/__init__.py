"""Each figure of the lab: numbers in, Figure out."""
# ruff: noqa: F401, I001

from utils.plots.drawing import Shown, panels, save, style, text
from utils.plots.networks import accuracy_against_latency, gamma_distributions, kept_channels
from utils.plots.networks import ladder, sorted_gammas, summary
from utils.plots.training import LiveCurve, finetuning_curves, sample_images, training_curves
