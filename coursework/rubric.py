"""What the course grades: seven blanks, each with its check, and what is graded by hand."""

from typing import NamedTuple

POINTS = 5
"""For each blank."""


class Blank(NamedTuple):
    """One of the seven: where it is, what is asked, and the call that checks it."""

    notebook: str
    name: str
    task: str
    hint: str
    check: str
    """Takes more arguments: the hidden test gives another seed."""


BLANKS = (
    Blank(
        "sparsity_train",
        "λ",
        "set l1_lambdas, the list of the λ to train with: 0 and two that are larger.",
        "one network shows what happens without a penalty, one what it is good for, one what too "
        "much of it does. What moves a γ from 0.5 to 0 within the epochs? (About 1e-4 to 1e-2; "
        "more for the few steps of the profile quick.)",
        "selfcheck.lambdas(l1_lambdas)",
    ),
    Blank(
        "sparsity_train",
        "the sub-gradient",
        "add the penalty's part to the gradient of this layer's γ.",
        "γ is bn.weight; backward() has left the loss's gradient in its .grad. The formula is "
        "above this cell.",
        "selfcheck.subgradient(add_subgradient, device)",
    ),
    Blank(
        "vggprune",
        "indices of kept channels",
        "from keep, which has one entry per channel, make out_idx: the numbers of the kept ones.",
        "a one-dimensional tensor of whole numbers, also where a single channel stays.",
        'selfcheck.copied("indices of kept channels", copy_channels, device)',
    ),
    Blank(
        "vggprune",
        "BN weight and bias",
        "copy γ and β of the kept channels from bn to new_bn.",
        "as the line above does it for the convolution, but each has one axis only.",
        'selfcheck.copied("BN weight and bias", copy_channels, device)',
    ),
    Blank(
        "vggprune",
        "running mean and variance",
        "copy what BN has measured on the kept channels from bn to new_bn.",
        "print(bn.state_dict().keys()) shows their names; they are no parameters.",
        'selfcheck.copied("running mean and variance", copy_channels, device)',
    ),
    Blank(
        "vggprune",
        "linear weight",
        "copy the classifier's weight for the channels that it still gets.",
        "its shape is (classes, channels of the last layer). What does in_idx hold by now?",
        'selfcheck.copied("linear weight", copy_channels, device)',
    ),
    Blank(
        "vggprune",
        "linear bias",
        "copy the classifier's bias.",
        "one number for each class.",
        'selfcheck.copied("linear bias", copy_channels, device)',
    ),
)
BY_HAND = {
    "pruning": (15, "Pruning at 0.5 and at 0.9"),
    "histograms": (10, "The distributions of γ"),
    "report": (40, "The report: sparsity and accuracy over the epochs; γ for three λ; the accuracy "
               "after 50 % and after 90 %; the fine-tuning curve of the 90 % network; problems"),
}  # fmt: skip
"""What no check can grade: points, and for what."""
