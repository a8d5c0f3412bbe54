"""The calibrator, and whether its feedback acts."""

import functools

import pytest
import torch
import torch.nn.functional as F

from pipeline.batches import Batches, ImageSets, Labelled, Mixture, TargetBatch
from pipeline.config import (
    AugmentSettings,
    CalibratorSettings,
    FeedbackSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from pipeline.data.decoded import load_images
from pipeline.data.manifest import load_manifest
from pipeline.data.sets import LabelledSet, PoolSet
from pipeline.data.sources import open_split
from pipeline.evaluate import evaluate_logits, predict_logits
from pipeline.networks.network import build_network
from pipeline.student import Feedback
from pipeline.teachers import Calibrator, CalibratorNetwork, FixedTargets
from pipeline.training import Journal, Training

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_calibrator_starts_near_the_identity(classes: int) -> None:
    """At (1 − floor)·q + floor/C, whatever C is; confident rows keep their class and can still move."""
    torch.manual_seed(0)
    network = CalibratorNetwork(classes, CalibratorSettings(floor=0.1))
    q = torch.cat([F.one_hot(torch.tensor([3]), classes).float(), torch.randn(4, classes).softmax(1)])
    out = network(q)
    torch.testing.assert_close(out, 0.9 * q + 0.1 / classes)
    torch.testing.assert_close(out.sum(1), torch.ones(5))
    out[0, 5].backward()
    assert float(network.layers[-1].bias.grad.abs().max()) > 1e-6 / classes


def test_weights_of_images_start_at_one_and_scale_their_targets() -> None:
    q = torch.randn(4, 5).softmax(1)
    torch.manual_seed(0)
    plain = CalibratorNetwork(5, CalibratorSettings())
    weighing = CalibratorNetwork(5, CalibratorSettings(image_weights=True))
    torch.testing.assert_close(weighing(q), plain(q))
    torch.nn.init.normal_(weighing.layers[-1].weight, std=0.1)
    calibrated, weight = weighing.parts(q)
    assert weight is not None
    torch.testing.assert_close(calibrated.sum(1), torch.ones(4))
    torch.testing.assert_close(weighing(q), weight[:, None] * calibrated)
    assert 0 < weight.min() < weight.max() < 2


def test_a_plain_perceptron_has_five_linear_layers() -> None:
    layers = CalibratorNetwork(10, CalibratorSettings(kind="perceptron")).layers
    widths = [(m.in_features, m.out_features) for m in layers if isinstance(m, torch.nn.Linear)]
    assert widths == [(10, 128), (128, 128), (128, 128), (128, 128), (128, 10)]


class GivenStep:
    """A step whose gradient in the targets is known."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def feedback(self, images: object, labels: object, engine: str) -> Feedback:
        return Feedback(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.tensor(1.0))


@pytest.mark.parametrize(("schedule", "share"), [("constant", 1.0), ("student", 0.25)])
def test_the_calibrators_rate_may_fall_as_the_students_does(schedule: str, share: float) -> None:
    """Adam's first step moves a parameter by its learning rate; the output biases start at zero, without decay."""
    settings = CalibratorSettings(schedule=schedule)
    calibrator = Calibrator(3, settings, FeedbackSettings(), student_lr=0.4)
    batch = TargetBatch(torch.zeros(3, 1), torch.eye(3), torch.ones(3, dtype=torch.bool))
    calibrator.adapt(calibrator.propose(batch), GivenStep(0.1), Labelled(torch.zeros(1), torch.zeros(1)))
    bias = calibrator.network.layers[-1].bias.detach()
    torch.testing.assert_close(bias.abs(), torch.full((3,), settings.lr * share), rtol=1e-3, atol=0)


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_the_calibrators_gradient_is_clipped_as_torch_does_it(limit: float | None) -> None:
    calibrator = Calibrator(3, CalibratorSettings(clip_norm=limit), FeedbackSettings())
    torch.nn.init.normal_(calibrator.network.layers[-1].weight)
    batch = TargetBatch(torch.zeros(3, 1), torch.eye(3), torch.ones(3, dtype=torch.bool))
    proposal = calibrator.propose(batch)
    gradient = GivenStep(0.1).feedback(None, None, "exact").gradient
    wanted = torch.autograd.grad((proposal.targets * gradient).sum(), list(calibrator.network.parameters()),
                                 retain_graph=True)  # fmt: skip
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    calibrator.adapt(proposal, GivenStep(0.1), Labelled(torch.zeros(1), torch.zeros(1)))
    factor = 1.0 if limit is None else min(1.0, limit / float(norm))
    assert (factor < 1) == (limit == 1e-3)
    for p, g in zip(calibrator.network.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, factor * g, rtol=1e-4, atol=1e-9)


def test_scaling_is_an_exponent_and_shares_of_the_classes() -> None:
    """Oracle: q^a · e^b, divided by its sum, of the floored q; at its start that itself."""
    network = CalibratorNetwork(4, CalibratorSettings(kind="scaling", floor=0.1)).double()
    q = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    floored = 0.9 * q + 0.1 / 4
    torch.testing.assert_close(network(q, torch.randn(6, 9)), floored, rtol=1e-12, atol=0)
    a, b = 0.7, torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        network.exponent.fill_(a)
        network.shift.copy_(b)
    expected = floored**a * b.exp()
    torch.testing.assert_close(network(q), expected / expected.sum(1, keepdim=True), rtol=1e-12, atol=0)
    assert sum(p.numel() for p in network.parameters()) == 5
    with pytest.raises(ValueError, match="image_weights need a perceptron"):
        CalibratorSettings(kind="scaling", image_weights=True)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("kind", ["residual", "perceptron"])
def test_rows_of_the_calibrator_are_distributions(kind: str, classes: int) -> None:
    """Also far from the start, and for one-hot and uniform rows."""
    torch.manual_seed(0)
    network = CalibratorNetwork(classes, CalibratorSettings(kind=kind))
    torch.nn.init.normal_(network.layers[-1].weight)
    q = torch.cat([torch.eye(classes)[:3], torch.full((1, classes), 1 / classes)])
    out = network(q)
    assert bool((out >= 0).all())
    torch.testing.assert_close(out.sum(1), torch.ones(4))


def test_rows_with_their_true_label_are_not_calibrated() -> None:
    torch.manual_seed(0)
    calibrator = Calibrator(4, CalibratorSettings(), FeedbackSettings())
    q = torch.eye(4)
    out = calibrator.propose(TargetBatch(torch.zeros(4, 3, 2, 2), q, torch.tensor([True, False, True, False]))).targets
    assert torch.equal(out[[1, 3]], q[[1, 3]])
    assert out[0, 0].item() < 1


@functools.lru_cache
def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels; the pool's true labels are the validation split's here."""
    images = load_images(open_split(load_manifest("digits"), split).read(), 8)
    return images.images, images.labels


def student_accuracy(tmp_path, *, swapped: bool, feedback: FeedbackSettings | None) -> float:
    """Top-1 on the test digits of a student taught on the validation digits by a teacher that knows them,
    but for two pairs of classes, and by feedback alone where it is given."""
    pixels, labels = digits("validation")
    order = torch.tensor([1, 0, 3, 2, 4, 5, 6, 7, 8, 9]) if swapped else torch.arange(10)
    smooth = 0.95 * F.one_hot(order, 10).float() + 0.005
    x, y = digits("labelled")
    settings = TrainSettings(
        steps=220,
        batch=64,
        ema_decay=0.95,
        optimizer=OptimizerSettings(rule="rmsprop_tf", lr=0.01, eps=1e-3),
        schedule=ScheduleSettings(warmup_steps=20),
        augment=AugmentSettings(rotate=10, translate=0.1, border="zero"),
    )
    pool = PoolSet(pixels, torch.ones(len(labels), dtype=torch.long), smooth[labels])
    sets = ImageSets(LabelledSet(x, y, 10, smooth[y]), pool, HALF, HALF)
    batches = Batches(sets, Mixture(0, 64, augment=settings.augment))
    torch.manual_seed(0)
    network = build_network(ModelSettings(name="wrn_10_1"), list("0123456789"), 8, HALF, HALF)
    network.model.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    teacher = FixedTargets() if feedback is None else Calibrator(10, CalibratorSettings(lr=1e-3), feedback)
    training = Training(network.model, teacher, batches, settings, Journal(tmp_path / "student", "test"))
    training.run()
    images, truth = digits("test")
    logits = predict_logits(training.average.module, images, HALF, HALF, batch=500, device=CPU)
    return evaluate_logits(logits, truth).top1


def test_feedback_alone_undoes_a_swap(tmp_path) -> None:
    """The small version of `mpl reproduce swapped-teacher`, one seed."""
    fixed = student_accuracy(tmp_path / "b", swapped=True, feedback=None)
    acting = student_accuracy(tmp_path / "c", swapped=True, feedback=FeedbackSettings())
    assert fixed < 70  # four classes of ten are swapped
    assert acting - fixed > 15


@pytest.mark.long
def test_feedback_of_the_controls_does_not_undo_a_swap(tmp_path) -> None:
    right = student_accuracy(tmp_path / "a", swapped=False, feedback=None)
    fixed = student_accuracy(tmp_path / "b", swapped=True, feedback=None)
    shuffled = student_accuracy(tmp_path / "d", swapped=True, feedback=FeedbackSettings(control="shuffled"))
    flipped = student_accuracy(tmp_path / "e", swapped=True, feedback=FeedbackSettings(control="flipped"))
    assert (shuffled - fixed) / (right - fixed) < 0.2
    assert (flipped - fixed) / (right - fixed) < 0.1
