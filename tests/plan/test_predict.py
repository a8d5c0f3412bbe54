"""`pipeline.plan.predict`: what a layout makes of a measured step. Recipes are asked how many images a step takes."""

from dataclasses import replace

import pytest
import torch

from pipeline.config import DistributedSettings, load_recipe
from pipeline.plan.needs import METHODS, feedback_images, needs_of
from pipeline.plan.predict import Impossible, Layout, Memory, Prediction
from pipeline.plan.step import PlannedMethod, network_sizes
from tests.plan.trainings import training


def phases(method: PlannedMethod, layout: Layout, **changes: object) -> dict[str, Memory]:
    needs = training(method, **changes)  # type: ignore[arg-type]
    images = replace(needs.images, pool=16, feedback=16, labelled=16 if needs.images.labelled else 0)
    return {phase.name: phase.memory for phase in Prediction(replace(needs, images=images), layout).phases()}


def test_a_recipe_says_how_many_images() -> None:
    """UDA's lesson holds labelled and strong images, which are the student's; others get the student's beside it."""
    recipe = load_recipe("digits", ["train_mpl.labelled_batch=24", "train_mpl.feedback_options.batch=40"])
    images = needs_of(recipe, "mpl-soft", 10, "float32").images
    assert (images.pool, images.feedback, images.labelled, images.lesson) == (64, 40, 24, 24 + 64)
    recipe = load_recipe("digits", ["train_mpl.labelled_batch=24", "train_mpl.method=supervised"])
    assert needs_of(recipe, "mpl-hard", 10, "float32").images.lesson == 24 + 64
    recipe = load_recipe("digits", ["train_mpl.labelled_batch=24", "train_mpl.method=pseudo_labels"])
    assert needs_of(recipe, "mpl-hard", 10, "float32").images.lesson == 24 + 64 + 64
    reduced = needs_of(recipe, "reduced", 10, "bf16", labelled=50, processes=8)
    assert (reduced.images.pool, reduced.images.feedback, reduced.images.lesson) == (64, 48, 0)
    assert reduced.settings.precision == torch.bfloat16


def test_feedback_takes_no_more_labelled_images_than_there_are() -> None:
    """By hand, for the 50 of digits; as training cuts it."""
    options = load_recipe("digits").train_reduced.feedback
    assert options.batch == 128
    assert [feedback_images(options, 50, n) for n in (1, 2, 4, 8)] == [50, 50, 48, 48]
    assert feedback_images(options, None, 1) == 128
    assert feedback_images(options, 1000, 3) == 126
    assert feedback_images(options, 50, 64) == 50
    part = options.model_copy(update={"held_out": 0.3})
    assert feedback_images(part, 50, 1) == 15


def test_soft_feedback_keeps_copies_of_the_students_weights_and_hard_none() -> None:
    """θ and v, and for a rule whose D is no number D; of tensors with at least two dimensions."""
    weights = network_sizes(training("mpl-soft").settings)["student"].weights
    sgd, adaptive = (phases("mpl-soft", Layout(1, 1), rule=rule)["feedback"]["replay"] for rule in ("sgd", "rmsprop"))
    assert 1.8 * weights < sgd <= 2 * weights
    assert adaptive == pytest.approx(1.5 * sgd)
    hard = phases("mpl-hard", Layout(1, 1))
    assert all("replay" not in memory for name, memory in hard.items() if name != "student's update")


def test_a_teacher_network_holds_its_activations_through_the_students_step() -> None:
    full, reduced = (phases(method, Layout(1, 1)) for method in ("mpl-hard", "reduced"))
    held = full["student's update"]["activations"]
    assert held > 5 * reduced["student's update"].get("activations", 0)
    assert held < full["student's forward"]["activations"] <= held + reduced["student's forward"]["activations"]


def test_shards_divide_what_can_be_divided() -> None:
    whole, part = (phases("mpl-hard", Layout(4 // shards, shards))["student's backward"] for shards in (1, 4))
    sizes = network_sizes(training("mpl-hard").settings)
    buffers = sum(size.buffers for size in sizes.values())
    assert part["optimiser"] == whole["optimiser"] / 4
    assert part["parameters"] - buffers == (whole["parameters"] - buffers) / 4
    assert part["activations"] == whole["activations"]
    assert part["gathered blocks"] == 3 * sizes["student"].largest_block
    assert "gathered blocks" not in whole


def test_ddp_holds_all_gradients_all_the_time() -> None:
    alone, together = (phases("mpl-hard", Layout(replicas, 1)) for replicas in (1, 4))
    weights = sum(size.weights for size in network_sizes(training("mpl-hard").settings).values())
    assert {memory["gradients"] for memory in together.values()} == {weights}
    assert alone["student's backward"]["gradients"] < weights


def test_a_layout_says_how_the_recipe_asks_for_it() -> None:
    """Oracle: the recipe's own settings, which refuse what they do not know."""
    for layout, kind in ((Layout(4, 1), "replicated"), (Layout(1, 4), "sharded"), (Layout(2, 4, True, 3), "hybrid")):
        section = DistributedSettings.model_validate(layout.settings)
        assert (section.layout, section.shard_size) == (kind, 4 if kind == "hybrid" else 1)
        assert (section.checkpoint_activations, section.micro_batches) == (layout.checkpointing, layout.micro_batches)


@pytest.mark.parametrize("method", METHODS)
def test_memory_falls_and_time_grows(method: PlannedMethod) -> None:
    """With micro-batches memory falls; with checkpointing so do activations, and operations grow."""
    needs = training(method)
    plain, parts, again = (
        Prediction(needs, layout) for layout in (Layout(1, 1), Layout(1, 1, micro_batches=8), Layout(1, 1, True))
    )
    assert parts.peak.total < plain.peak.total
    assert again.peak.memory["activations"] < plain.peak.memory["activations"]
    assert plain.flops() < again.flops() < 4 / 3 * plain.flops()
    assert parts.flops() == plain.flops() if method == "reduced" else parts.flops() > plain.flops()


def test_divided_weights_take_finite_differences_which_bf16_rules_out() -> None:
    needs = replace(
        training("mpl-soft"), images=replace(training("mpl-soft").images, pool=16, feedback=16, labelled=16)
    )
    assert Prediction(needs, Layout(4, 1)).exact
    assert not Prediction(needs, Layout(1, 4)).exact
    low = replace(needs, settings=replace(needs.settings, precision=torch.bfloat16))
    with pytest.raises(Impossible, match="use --precision float32"):
        Prediction(low, Layout(1, 4))
