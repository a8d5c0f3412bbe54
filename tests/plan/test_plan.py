"""`pipeline.plan`: what is counted without data is what real tensors take; what is chosen fits."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import timm
import torch
from pipeline.feedback import forward_mode, labelled_loss_gradient, log_probabilities, record
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import DistributedSettings, ModelSettings, OptimizerSettings, load_recipe
from pipeline.errors import RecipeError, UsageError
from pipeline.models import resolve
from pipeline.optim import build_optimizer
from pipeline.plan.choose import plan, predict
from pipeline.plan.cluster import Cluster, accelerator
from pipeline.plan.live import LiveBytes
from pipeline.plan.needs import METHODS, Needs, all_needs, feedback_images
from pipeline.plan.network import Costs, checkpointing
from pipeline.plan.step import Layout, Step

NETWORKS = {"wrn_10_1": 16, "test_efficientnet": 32, "test_vit": 32}
GIB = 2**30


@cache
def costs(name: str, precision: torch.dtype | None = None) -> Costs:
    return Costs(ModelSettings(name=name), NETWORKS[name], 7, precision)


def real(name: str) -> nn.Module:
    """The same network with data."""
    known, arguments = resolve(ModelSettings(name=name), NETWORKS[name])
    return timm.create_model(known, num_classes=7, **arguments).train()


def images(name: str, n: int) -> Tensor:
    size = NETWORKS[name]
    return torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)


def live_peak(run: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at a time while real data is calculated."""
    with LiveBytes() as live:
        kept = run()
    del kept
    return live.peak


# --- what is counted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_saved_activations_are_those_of_a_real_forward(name: str, precision: torch.dtype | None) -> None:
    """Oracle: what autograd packs in a forward pass over real images, by address."""
    model, x, packed = real(name), images(name, 5), {}
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(t: Tensor) -> Tensor:
        packed[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = log_probabilities(model, x, precision)
    expected = sum(t.untyped_storage().nbytes() for address, t in packed.items() if address not in own)
    del kept
    found = costs(name, precision).saved_bytes(5)
    # without data torch takes batch statistics for bfloat16, and keeps them in float32 otherwise
    assert found == (expected if precision is None else pytest.approx(expected, rel=0.01))
    assert expected > 5 * 1000


@pytest.mark.parametrize("name", NETWORKS)
def test_passes_need_what_real_ones_need(name: str) -> None:
    """Oracle: the living bytes of real passes, at a number of images that was not measured."""
    model, n = real(name), 9
    x, y, q = images(name, n), torch.randint(0, 7, (n,)), torch.full((n, 7), 1 / 7)
    parameters = list(model.parameters())

    def train() -> Any:
        return torch.autograd.grad(-(q * log_probabilities(model, x, None)).sum(1).mean(), parameters)

    replay = record(model, x, None)
    direction = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    found = costs(name)
    # the plan's targets are allocated within its pass, and the replay's clones of buffers are counted there as well
    assert found.training.peak(n) == pytest.approx(live_peak(train), abs=4096)
    assert found.labelled.peak(n) == pytest.approx(
        live_peak(lambda: labelled_loss_gradient(model, x, y, None)), abs=4096
    )
    assert found.forward_mode is not None
    assert found.forward_mode.peak(n) == pytest.approx(live_peak(lambda: forward_mode(replay, direction)), abs=4096)
    with checkpointing(model):
        again = live_peak(train)
    assert found.checkpointed.peak(n) == pytest.approx(again, abs=4096)
    assert again <= live_peak(train)


def test_the_peak_is_what_the_allocator_gives_out() -> None:
    """Oracle: torch's profiler of memory; kernels take a little for themselves."""
    name, n = "wrn_10_1", 64
    model, x = real(name), images(name, n)
    parameters = list(model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = torch.autograd.grad(-log_probabilities(model, x, None).mean(), parameters)
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    living = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert costs(name).training.peak(n) == pytest.approx(max(living), rel=0.05)


def test_gradients_are_told_from_activations() -> None:
    """At the end of a backward pass all gradients live, and only they are divided over shards."""
    found = costs("wrn_10_1")
    last = found.training.backward
    assert last.gradient[-1] == found.parameter_bytes
    assert last.gradient[0] < found.parameter_bytes
    assert last.moment(1, shards=10**9) == (last.activations(1), 0)
    assert sum(last.moment(1)) > last.activations(1)
    # what waits at the turning point is what the hooks count, and the few bytes of the loss
    held, saved = found.training.held(64), found.saved_bytes(64)
    image_bytes = 64 * 3 * NETWORKS["wrn_10_1"] ** 2 * 4  # stand outside of a pass
    assert held == pytest.approx(saved - image_bytes, rel=0.01)


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_those_of_torch_and_of_the_rule_of_three(name: str) -> None:
    """Oracle: torch's own counter on real tensors for the forward pass; a backward pass is two forwards, less the
    gradient in the images, and the forward-mode pass multiplies three times where the forward does once."""
    model, n = real(name), 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(name, n))
    found, forward = costs(name), counter.get_total_flops()
    assert found.forward.flops(n) == forward
    assert 2.5 * forward < found.training.flops(n) <= 3.1 * forward
    assert found.forward_mode is not None
    assert found.forward_mode.flops(n) == pytest.approx(3 * forward, rel=0.06)


def test_depthwise_convolutions_are_counted_with_their_groups() -> None:
    """By hand: 2 · pixels · channels · kernel, forward and in each of two gradients."""
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    with LiveBytes() as live:
        layer(x).sum().backward()
    assert live.flops == 3 * (2 * 2 * 25 * 8 * 9)


@pytest.mark.parametrize("rule", ["sgd", "nesterov", "rmsprop", "rmsprop_tf", "adamw"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_and_optimiser_state_are_exact(rule: Any, momentum: float) -> None:
    """Oracle: a real optimiser after a real step."""
    if rule == "nesterov" and not momentum:
        pytest.skip("torch has no such rule")
    settings = OptimizerSettings(rule=rule, momentum=momentum)
    model = real("test_efficientnet")
    optimizer = build_optimizer(model, settings)
    model(images("test_efficientnet", 2)).sum().backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    found = costs("test_efficientnet")
    assert found.optimizer_bytes(settings) == sum(t.numel() * t.element_size() for t in tensors)
    assert found.parameter_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert found.buffer_bytes == sum(b.numel() * b.element_size() for b in model.buffers())


def test_the_largest_block_is_gathered_whole() -> None:
    """By hand: the last of three blocks of WRN-10-1, 32 to 64 channels, with its 1×1 shortcut and two norms."""
    block = 4 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64 + 2 * 32 + 2 * 64)
    assert costs("wrn_10_1").largest_block_bytes == block


def test_unknown_networks_are_named() -> None:
    with pytest.raises(RecipeError, match="did you mean"):
        Costs(ModelSettings(name="resnet81"), 32, 7).model  # noqa: B018


# --- a step ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> dict[str, Needs]:
    """The methods on digits; their networks are followed once."""
    changes = [
        "train_reduced.model.dropout=0.2",
        "train_mpl.labelled_batch=64",
        "train_mpl.feedback_options.batch=64",
        "train_reduced.feedback.batch=64",
    ]
    recipe = load_recipe("digits", changes)
    return {found.method: found for found in all_needs(recipe, METHODS, 10, "float32")}


def test_a_recipe_says_how_many_images(planned: dict[str, Needs]) -> None:
    """UDA's lesson holds labelled and strong images, which are the student's; the weak ones are predicted."""
    soft = planned["mpl-soft"]
    assert soft.teacher is not None
    assert (soft.batch, soft.feedback_batch, soft.teacher.learned, soft.teacher.predicted) == (64, 64, 128, 64)
    recipe = load_recipe("digits", ["train_mpl.method=supervised", "train_mpl.labelled_batch=24"])
    (alone,) = all_needs(recipe, ["mpl-hard"], 10, "float32")
    assert alone.teacher is not None
    assert (alone.teacher.learned, alone.teacher.predicted) == (24 + 64, 0)  # the student's images are appended
    assert planned["reduced"].calibrator == 10 * 128 + 128 + 3 * (128 * 128 + 128) + 128 * 10 + 10


def test_feedback_takes_no_more_labelled_images_than_there_are() -> None:
    """By hand, for the 50 of digits; as `pipeline.lessons` and `pipeline.student_data` cut it."""
    options = load_recipe("digits").train_reduced.feedback
    assert options.batch == 128
    assert [feedback_images(options, 50, n) for n in (1, 2, 4, 8)] == [50, 50, 48, 48]
    assert feedback_images(options, None, 1) == 128
    assert feedback_images(options, 1000, 3) == 126
    assert feedback_images(options, 50, 64) == 50
    part = options.model_copy(update={"held_out": 0.3})
    assert feedback_images(part, 50, 1) == 15


def test_soft_feedback_keeps_three_copies_and_hard_none(planned: dict[str, Needs]) -> None:
    """θ, D and v of the student, of which SGD's D is a number."""
    student = planned["mpl-soft"].student
    phases = {phase.name: phase for phase in Step(planned["mpl-soft"], Layout(1, 1)).phases()}
    own, buffers = student.parameter_bytes, student.buffer_bytes
    assert phases["feedback"].memory["replay"] == 3 * own + 2 * buffers
    sgd = replace(planned["mpl-soft"], optimizer=OptimizerSettings(rule="sgd"))
    assert {p.name: p for p in Step(sgd, Layout(1, 1)).phases()}["feedback"].memory["replay"] == 2 * own + 2 * buffers
    assert all("replay" not in phase.memory for phase in Step(planned["mpl-hard"], Layout(1, 1)).phases())


def test_a_teacher_network_holds_its_activations_through_the_students_step(planned: dict[str, Needs]) -> None:
    teacher = planned["mpl-hard"].teacher
    assert teacher is not None
    phases = {phase.name: phase for phase in Step(planned["mpl-hard"], Layout(1, 1)).phases()}
    held = teacher.costs.training.held(teacher.learned)
    reduced = {phase.name: phase for phase in Step(planned["reduced"], Layout(1, 1)).phases()}
    difference = phases["student's forward"].memory["activations"] - reduced["student's forward"].memory["activations"]
    assert difference == held > 0


def test_shards_divide_what_can_be_divided(planned: dict[str, Needs]) -> None:
    whole, part = (Step(planned["mpl-hard"], Layout(4 // s, s)) for s in (1, 4))
    standing, divided = next(iter(whole.phases())).memory, next(iter(part.phases())).memory
    buffers = 2 * planned["mpl-hard"].student.buffer_bytes
    assert divided["optimiser"] == standing["optimiser"] / 4
    assert divided["parameters"] - buffers == (standing["parameters"] - buffers) / 4
    assert "gathered blocks" in divided
    assert "gathered blocks" not in standing


def test_a_layout_says_how_the_recipe_asks_for_it() -> None:
    """Oracle: the recipe's own settings, which refuse what they do not know."""
    for layout, kind in ((Layout(4, 1), "replicated"), (Layout(1, 4), "sharded"), (Layout(2, 4, True, 3), "hybrid")):
        found = DistributedSettings.model_validate(layout.settings)
        assert (found.layout, found.shard_size) == (kind, 4 if kind == "hybrid" else 1)
        assert (found.checkpoint_activations, found.micro_batches) == (layout.checkpointing, layout.micro_batches)


@pytest.mark.parametrize("method", METHODS)
def test_memory_falls_and_time_grows(planned: dict[str, Needs], method: str) -> None:
    """With micro-batches memory falls; with checkpointing so do activations, and operations grow."""
    plain, parts, again = (
        Step(planned[method], layout)
        for layout in (Layout(1, 1), Layout(1, 1, micro_batches=8), Layout(1, 1, checkpointing=True))
    )
    assert parts.peak.total < plain.peak.total
    assert again.peak.memory["activations"] < plain.peak.memory["activations"]
    teacher = planned[method].teacher  # forward twice with micro-batches
    again_forward = 0.0 if teacher is None else teacher.costs.forward.flops(teacher.learned)
    assert parts.flops() == pytest.approx(plain.flops() + again_forward)
    assert plain.flops() < again.flops() < 4 / 3 * plain.flops()


def test_operations_of_a_step_by_hand(planned: dict[str, Needs]) -> None:
    """Reduced MPL: forward and backward on the batch, on the labelled images, and one forward-mode pass."""
    student = planned["reduced"].student
    expected = student.training.flops(64) + student.labelled.flops(64) + student.forward_mode.flops(64)  # type: ignore[union-attr]
    assert Step(planned["reduced"], Layout(1, 1)).flops() == pytest.approx(expected)
    rarely = replace(planned["reduced"], every=4)
    assert Step(rarely, Layout(1, 1)).flops() == pytest.approx(
        expected - 0.75 * (expected - student.training.flops(64))
    )
    hard, teacher = planned["mpl-hard"], planned["mpl-hard"].teacher
    assert teacher is not None
    student = hard.student
    assert Step(hard, Layout(1, 1)).flops() == pytest.approx(
        student.training.flops(64) + 2 * student.forward.flops(64)
        + teacher.costs.forward.flops(64) + teacher.costs.training.flops(128)
    )  # fmt: skip


# --- a cluster ------------------------------------------------------------------------------------------


def cluster(**changes: Any) -> Cluster:
    figures = {"accelerators": 1, "per_node": 8, "memory": 8 * GIB, "flops": 1e12, "efficiency": 0.5,
               "bandwidth": 100e9, "between_nodes": 10e9}  # fmt: skip
    return Cluster(**(figures | changes))


def test_collectives_take_the_slowest_link_of_their_ring() -> None:
    """By hand: an all-reduce in a ring sends 2 (n − 1)/n of the bytes."""
    two_nodes = cluster(accelerators=16)
    assert two_nodes.all_reduce_seconds(1e9, 8) == pytest.approx(2 * 7 / 8 / 100)
    assert two_nodes.all_reduce_seconds(1e9, 16) == pytest.approx(2 * 15 / 16 / 10)
    assert two_nodes.all_reduce_seconds(1e9, 2, stride=8) == pytest.approx(2 * 1 / 2 / 10)
    assert two_nodes.gather_seconds(1e9, 8) == pytest.approx(7 / 8 / 100)


def test_the_chosen_layout_fits_and_the_next_faster_does_not(planned: dict[str, Needs]) -> None:
    """As memory shrinks: plain, then checkpointing or micro-batches, then shards, then nothing."""
    ample = plan(planned["mpl-hard"], cluster()).chosen
    assert ample is not None
    assert ample.layout == Layout(1, 1)
    need = ample.peak.total
    tight = cluster(memory=need * 0.8, headroom=0.0)
    chosen = plan(planned["mpl-hard"], tight).chosen
    assert chosen is not None
    assert chosen.peak.total <= tight.usable < need
    assert chosen.layout != ample.layout
    assert chosen.compute >= ample.compute
    assert not predict(planned["mpl-hard"], tight, Layout(1, 1)).fits


def test_where_nothing_fits_the_advice_is_true(planned: dict[str, Needs]) -> None:
    """What is said to be missing suffices exactly."""
    small = cluster(memory=3 * 2**20, headroom=0.0)
    found = plan(planned["mpl-soft"], small)
    assert found.chosen is None
    missing = found.leanest.peak.total - small.usable
    assert f"{missing / GIB:.2f} GiB" in found.advice[0]
    assert found.leanest.peak.total == min(choice.peak.total for choice in found.considered)
    assert plan(planned["mpl-soft"], replace(small, memory=found.leanest.peak.total)).chosen is not None
    assert plan(planned["mpl-soft"], replace(small, memory=found.leanest.peak.total - 1)).chosen is None


def test_divided_weights_take_finite_differences_which_bf16_rules_out(planned: dict[str, Needs]) -> None:
    four = Layout(1, 4)
    assert Step(planned["mpl-soft"], Layout(4, 1)).exact
    assert not Step(planned["mpl-soft"], four).exact
    low = replace(planned["mpl-soft"], student=replace(planned["mpl-soft"].student, precision=torch.bfloat16))
    assert all(choice.layout.shards == 1 for choice in plan(low, cluster(accelerators=4)).considered)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accelerators": 0}, "at least 1"),
        ({"per_node": 0}, "at least 1"),
        ({"accelerators": 12, "per_node": 8}, "must divide --accelerators"),
        ({"memory": 0}, "--memory must be above 0"),
        ({"flops": -1.0}, "--flops must be above 0"),
        ({"bandwidth": 0.0}, "--bandwidth"),
        ({"headroom": 1.0}, "--headroom"),
        ({"efficiency": 1.5}, "--efficiency"),
    ],
)
def test_impossible_clusters_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cluster(**changes)


def test_batches_that_are_not_divided_are_refused(planned: dict[str, Needs]) -> None:
    with pytest.raises(UsageError, match=r"must divide every batch, and 64 pool images .* Nearest: 60 or 65"):
        plan(planned["reduced"], cluster(accelerators=5))


def test_accelerators_by_name() -> None:
    assert accelerator("tpu-v3-core").memory == 16
    with pytest.raises(UsageError, match="did you mean h100-80gb"):
        accelerator("h100-80")
