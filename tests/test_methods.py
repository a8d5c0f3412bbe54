"""Methods: what each teaches, from hand-made predictions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import load_recipe
from pipeline.errors import RecipeError
from pipeline.methods import Lesson, Method, Views, method_names, parse_method

C = 4


def views(step: int = 0) -> Views:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 3, 2, 2)
    targets = F.one_hot(torch.tensor([0, 1, 2]), C).float()
    partner = images[3], F.one_hot(torch.tensor([1, 1, 3]), C).float()
    return Views(step, images[0], targets, partner, torch.tensor([0.1, 0.5, 0.9]), images[1], images[2])


PREDICTED = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.5, 0.3, 0.1, 0.1], [0.0, 0.1, 0.2, 0.7]])


def lesson(method: Method, step: int = 0) -> tuple[Lesson, Views, list[Tensor]]:
    """The lesson, its views, and the images that the method asked predictions for."""
    asked: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        asked.append(images)
        return PREDICTED

    given = views(step)
    return method.lesson(given, predict), given, asked


def test_there_is_a_file_for_each_method() -> None:
    expected = {"supervised", "label_smoothing", "randaugment", "mixup", "pseudo_labels", "uda", "fixmatch"}
    assert set(method_names()) == expected
    assert all(parse_method(name).name == name for name in expected)


@pytest.mark.parametrize("name", ["supervised", "randaugment"])
def test_supervised_and_randaugment_differ_by_the_view_alone(name: str) -> None:
    found, given, asked = lesson(parse_method(name))
    assert found.pool is None
    assert not asked
    assert found.labelled.images is given.labelled
    assert torch.equal(found.labelled.targets, given.targets)
    assert parse_method(name).labelled_view == {"supervised": "weak", "randaugment": "strong"}[name]


def test_label_smoothing() -> None:
    found, _, _ = lesson(parse_method({"name": "label_smoothing", "smoothing": 0.2}))
    torch.testing.assert_close(found.labelled.targets[0], torch.tensor([0.85, 0.05, 0.05, 0.05]))


def test_mixup_mixes_images_and_labels_alike() -> None:
    """α = 1: λ is the uniform number itself. Another α: λ has Beta's quantiles (the median is 1/2)."""
    found, given, _ = lesson(parse_method("mixup"))
    share = given.uniform
    expected = share[:, None] * given.targets + (1 - share[:, None]) * given.partner[1]
    torch.testing.assert_close(found.labelled.targets, expected)
    row = share[0] * given.labelled[0] + (1 - share[0]) * given.partner[0][0]
    torch.testing.assert_close(found.labelled.images[0], row)
    sharp, _, _ = lesson(parse_method({"name": "mixup", "alpha": 0.2}))
    torch.testing.assert_close(sharp.labelled.targets[1], 0.5 * given.targets[1] + 0.5 * given.partner[1][1])
    assert float(sharp.labelled.targets[0, 0]) < 0.01


def test_pseudo_labels_are_learned_on_the_images_that_were_labelled() -> None:
    found, given, asked = lesson(parse_method("pseudo_labels"))
    assert asked[0] is given.pool_weak
    assert found.pool.images is given.pool_weak
    assert found.pool.targets.argmax(1).tolist() == [0, 0, 3]
    assert torch.equal(found.pool.weight, torch.ones(3))


def test_uda_sharpens_masks_and_ramps() -> None:
    """Targets p^(1/T), renormalised; those below the threshold do not count; the weight grows linearly."""
    method = parse_method({"name": "uda", "weight": 8, "temperature": 0.5, "threshold": 0.6, "ramp_steps": 10})
    found, given, asked = lesson(method, step=5)
    assert asked[0] is given.pool_weak
    assert found.pool.images is given.pool
    sharp = PREDICTED**2 / (PREDICTED**2).sum(1, keepdim=True)
    torch.testing.assert_close(found.pool.targets, sharp)
    assert found.pool.weight.tolist() == [4.0, 0.0, 4.0]
    assert lesson(method, step=50)[0].pool.weight.tolist() == [8.0, 0.0, 8.0]


def test_fixmatch() -> None:
    found, given, _ = lesson(parse_method("fixmatch"))
    assert found.pool.images is given.pool
    assert found.pool.weight.tolist() == [1.0, 0.0, 0.0]
    assert found.pool.targets.argmax(1).tolist() == [0, 0, 3]


def test_the_loss_is_the_mean_over_each_kind() -> None:
    """Oracle: the two cross-entropies written out; and the rows' weights give the same as one mean."""
    found, _, _ = lesson(parse_method({"name": "uda", "weight": 3.0, "threshold": 0.6}))
    log_p = torch.randn(6, C).log_softmax(1)
    labelled = -(found.labelled.targets * log_p[:3]).sum(1).mean()
    pool = -(found.pool.targets * log_p[3:]).sum(1)[[0, 2]].sum() / 3
    torch.testing.assert_close(found.loss(log_p), labelled + 3 * pool)
    targets, weight = found.rows()
    torch.testing.assert_close((weight * -(targets * log_p).sum(1)).mean(), labelled + 3 * pool)
    assert len(found.images()) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train_mpl.method=udda", "did you mean uda?"),
        ("train_mpl.method.tmperature=1", "has no setting tmperature; it has: ramp_steps, temperature"),
        ("train_mpl.method.threshold=1.5", "less than or equal to 1"),
        ("train_mpl.student_wait=790", "together must be below steps"),
        ("train_mpl.teacher.label_noise=1", "less than 1"),
    ],
)
def test_wrong_settings_are_explained(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        load_recipe("digits", [change])


def test_a_method_is_kept_with_its_settings() -> None:
    recipe = load_recipe("digits", ["train_mpl.method=fixmatch", "train_mpl.method.threshold=0.8"][:1])
    kept = recipe.model_dump(mode="json")["train_mpl"]["method"]
    assert kept == {"name": "fixmatch", "weight": 1.0, "threshold": 0.95}
