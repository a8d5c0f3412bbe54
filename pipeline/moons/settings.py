"""Settings of the two-moons experiment, the paper's and changes of them."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pipeline.config import Settings

MethodName = Literal["all_labels", "supervised", "pseudo_labels", "uda", "mpl", "mpl_uda"]
VariantName = Literal["paper", "working"]

LABELS: dict[MethodName, str] = {
    "all_labels": "All 2,000 labels",
    "supervised": "Supervised",
    "pseudo_labels": "Pseudo Labels",
    "uda": "UDA",
    "mpl": "MPL",
    "mpl_uda": "MPL + UDA",
}
PLAIN: tuple[MethodName, ...] = ("all_labels", "supervised", "pseudo_labels", "mpl")
EVERY: tuple[MethodName, ...] = (*PLAIN, "uda", "mpl_uda")


class MoonsSettings(Settings):
    """Data, networks and training; the defaults are the paper's, or as commented where it says nothing."""

    points: PositiveInt = 2000  # half of them in each cluster
    labelled: PositiveInt = 3  # labelled points of each cluster
    noise: NonNegativeFloat = 0.1  # standard deviation; the paper does not say. Circles of radius 1
    hidden: PositiveInt = 8  # units of each of the two hidden layers
    init: PositiveFloat = 0.1  # weights and biases are uniform in ± this
    lr: PositiveFloat = 0.1  # of every network, constant; plain SGD
    steps: PositiveInt = 10_000  # of every network; the paper does not say
    batch: PositiveInt = 64  # unlabelled points of a step; the paper does not say
    supervised_weight: NonNegativeFloat = 1.0  # of the six labels in MPL's teacher
    feedback: Literal["soft", "hard"] = "soft"  # the exact equation 3, or sampled labels and old minus new loss
    feedback_weight: NonNegativeFloat = 1.0  # of R after the student's step; 1: equation 3 as it stands
    control: Literal["none", "flipped", "off"] = "none"  # of the feedback: wrong sign, or none
    consistency_weight: NonNegativeFloat = 3.0  # UDA: of the points that are moved at random
    consistency_noise: NonNegativeFloat = 0.2  # UDA: standard deviation of that movement
    temperature: float = Field(default=0.4, gt=0.0)  # UDA: of its targets
    success: float = Field(default=0.98, gt=0.5, le=1.0)  # accuracy over all points from which a draw counts


PAPER = MoonsSettings()
WORKING = MoonsSettings(init=1.0, lr=1.0, steps=4000)
VARIANTS: dict[VariantName, MoonsSettings] = {"paper": PAPER, "working": WORKING}
