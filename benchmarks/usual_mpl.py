"""Meta Pseudo Labels as it is usually run in PyTorch, to compare with: written from the paper's algorithm.

Images are augmented one by one with Pillow in the workers of a DataLoader. The feedback is `hard`, in its usual
form: pseudo labels are the teacher's most probable classes, and h is the difference of two labelled losses of the
student, of which the first comes out of its training forward.

Source: arXiv:2003.10580v4, sections 2 and 3; the UDA loss, arXiv:1904.12848.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from pipeline.config import TrainMplSettings
from pipeline.data.sets import LabelledSet

GREY = (127, 127, 127)


class Cutout:
    """A grey square with its centre anywhere in the image."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        x, y = (int(torch.randint(length, ())) - self.side // 2 for length in image.size)
        ImageDraw.Draw(image).rectangle((x, y, x + self.side - 1, y + self.side - 1), GREY)
        return image


class PoolViews(Dataset[tuple[Tensor, Tensor]]):
    """A weak and a strong view of each image."""

    def __init__(self, pixels: Tensor, weak: Any, strong: Any) -> None:
        self.pixels, self.weak, self.strong = pixels.permute(0, 2, 3, 1).contiguous().numpy(), weak, strong

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.pixels[index])
        return self.weak(image), self.strong(image)


class LabelledViews(Dataset[tuple[Tensor, int]]):
    """A weak view of each labelled image, and its label."""

    def __init__(self, labelled: LabelledSet, weak: Any) -> None:
        self.pixels, self.weak = labelled.pixels.permute(0, 2, 3, 1).contiguous().numpy(), weak
        self.labels = labelled.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.weak(Image.fromarray(self.pixels[index])), self.labels[index]


def loaders(
    labelled: LabelledSet,
    pool: Tensor,
    settings: TrainMplSettings,
    statistics: tuple[Any, Any],
    workers: int,
    pin: bool,
) -> tuple[Iterator[Any], Iterator[Any]]:
    """(labelled, pool): endless batches, `workers` processes each; views as the recipe's, by torchvision."""
    side = pool.shape[-1]
    last = [transforms.ToTensor(), transforms.Normalize(*statistics)]

    def moved(padding: int) -> list[Any]:
        crop = transforms.RandomCrop(side, padding=padding, padding_mode="reflect")
        return [transforms.RandomHorizontalFlip(), crop]

    strong = settings.augment
    operations = transforms.RandAugment(strong.randaugment_layers, round(3 * strong.randaugment_magnitude))
    weak_view = transforms.Compose([*moved(settings.weak.crop_padding), *last])
    strong_view = transforms.Compose([*moved(strong.crop_padding), operations, Cutout(strong.cutout), *last])

    def endless(data: Dataset[Any], batch: int) -> Iterator[Any]:
        sampler = RandomSampler(data, replacement=True, num_samples=10**9)  # type: ignore[arg-type]
        return iter(DataLoader(data, batch, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=pin))

    pool_views = PoolViews(pool, weak_view, strong_view)
    return (
        endless(LabelledViews(labelled, weak_view), settings.labelled_batch),
        endless(pool_views, settings.batch),
    )


class UsualLoop:
    """One step after another: UDA teacher with hard feedback, student, moving average.

    Args:
        teacher, student: networks on their device.
        settings: of the optimisers and of UDA.
        device: where they are.
        autocast: dtype of mixed precision, or None.
        channels_last: our memory format instead of torch's own.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        settings: TrainMplSettings,
        device: str,
        autocast: torch.dtype | None,
        *,
        channels_last: bool,
    ) -> None:
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.teacher, self.student = (
            m.to(device=device, memory_format=self.format).train() for m in (teacher, student)
        )
        o = settings.optimizer
        self.teacher_optimizer, self.student_optimizer = (
            torch.optim.SGD(m.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=True)
            for m in (teacher, student)
        )
        self.average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.settings, self.device, self.autocast = settings, device, autocast

    def load(self, labelled: Any, pool: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batches of the loaders on the device: (labelled, labels, weak, strong)."""
        (images, labels), (weak, strong) = labelled, pool
        x, w, s = (t.to(self.device, non_blocking=True, memory_format=self.format) for t in (images, weak, strong))
        return x, labels.to(self.device, non_blocking=True), w, s

    def step(self, images: Tensor, labels: Tensor, weak: Tensor, strong: Tensor) -> tuple[float, float]:
        """One update of both networks; their losses."""
        count, method, cast = len(images), self.settings.method, self.autocast
        with torch.autocast(torch.device(self.device).type, cast, enabled=cast is not None):
            logits = self.teacher(torch.cat([images, weak, strong])).float()
            of_labelled, of_weak, of_strong = logits.split([count, len(weak), len(strong)])
            sharp = (of_weak.detach() / method.temperature).softmax(1)  # type: ignore[attr-defined]
            sure = (sharp.amax(1) >= method.threshold).float()  # type: ignore[attr-defined]
            consistency = -(sharp * of_strong.log_softmax(1)).sum(1)
            teacher_loss = F.cross_entropy(of_labelled, labels) + (sure * consistency).mean()
            pseudo = of_strong.detach().argmax(1)

            answers = self.student(torch.cat([images, strong])).float()
            before = F.cross_entropy(answers[:count].detach(), labels)
            student_loss = F.cross_entropy(answers[count:], pseudo)
        self.student_optimizer.zero_grad(set_to_none=True)
        student_loss.backward()
        self.student_optimizer.step()
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, cast, enabled=cast is not None):
            after = F.cross_entropy(self.student(images).float(), labels)
        teacher_loss = teacher_loss + (before - after) * F.cross_entropy(of_strong, pseudo)
        self.teacher_optimizer.zero_grad(set_to_none=True)
        teacher_loss.backward()
        self.teacher_optimizer.step()
        self.average.update_parameters(self.student)
        return teacher_loss.item(), student_loss.item()
