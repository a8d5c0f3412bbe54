"""Changes of the recipe that make a method: its settings, and the same network, steps and batch for all."""

import json
from typing import Any

from pipeline.batches import mixture
from pipeline.methods import parse_method
from pipeline.trainings import mpl_settings
from stages.options import Context

NOISY = "noisystudent"
POOL = ("train_reduced.student_data=pool", "train_reduced.feedback.held_out=0")  # the student sees the pool alone
RAW = ("train_reduced.feedback.scale=raw", "train_reduced.calibrator.weight_decay=0")
SCALED = (
    "train_reduced.feedback.scale=per_image",
    "train_reduced.calibrator.weight_decay=1.0e-4",
)  # the former default
METHODS = {  # name: for people
    "supervised": "Supervised",
    "label_smoothing": "Label smoothing",
    "randaugment": "RandAugment",
    "mixup": "Mixup",
    "pseudo_labels": "Pseudo Labels",
    "uda": "UDA",
    "fixmatch": "FixMatch",
    NOISY: "NoisyStudent",
}


def method_changes(context: Context, name: str) -> tuple[str, ...]:
    """Changes that make one of `METHODS`."""
    settings = mpl_settings(context.recipe)
    if name == NOISY:
        model = json.dumps(settings.model.model_dump(mode="json"))
        return (
            "train_reduced.teacher=fixed",
            f"train_reduced.model={model}",
            f"train_reduced.steps={settings.steps}",
            f"train_reduced.batch={settings.batch}",
        )
    method = json.dumps(method_settings(context, name))
    # What sets these two apart is the smoothing; the recipe's own, a part of all others, would make them one.
    smoothing = ("train_mpl.label_smoothing=0",) if name in ("supervised", "label_smoothing") else ()
    return (f"train_mpl.method={method}", *smoothing)


def method_settings(context: Context, name: str) -> dict[str, Any]:
    """The recipe's settings of a method: train_mpl.method, reproduce.methods, else the method's defaults."""
    known = [mpl_settings(context.recipe).method, *context.recipe.reproduce.methods]
    method = next((method for method in known if method.name == name), None) or parse_method(name)
    return method.model_dump(mode="json")


def fixed_on_reduced_data(context: Context) -> tuple[str, ...]:
    """NoisyStudent on the images and targets that Reduced MPL's student sees."""
    own = mixture(context.recipe.train_reduced, "calibrator")
    return (
        "train_reduced.teacher=fixed",
        f"train_reduced.student_data={'pool+labelled' if own.labelled else 'pool'}",
        f"train_reduced.labelled_target={'label' if own.true_labels else 'teacher'}",
    )
