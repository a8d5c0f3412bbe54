"""Reduced Meta Pseudo Labels under the name of its distribution: `from reduced_mpl import Student, Training, …`.

`pipeline` is a common name, so what Python finds under it is checked here; and our architectures are made known to
timm, so that `timm.create_model("local-dir:runs/NAME/student", pretrained=True)` loads a network that was saved here.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline import Batch as Batch
    from pipeline import Calibrator as Calibrator
    from pipeline import FixedTargets as FixedTargets
    from pipeline import Journal as Journal
    from pipeline import Labelled as Labelled
    from pipeline import Proposal as Proposal
    from pipeline import Student as Student
    from pipeline import TargetBatch as TargetBatch
    from pipeline import TargetsStore as TargetsStore
    from pipeline import TeacherNetwork as TeacherNetwork
    from pipeline import Training as Training
    from pipeline import load_network as load_network
    from pipeline import load_recipe as load_recipe
    from pipeline import select_top_k as select_top_k


def _require_our_pipeline() -> None:
    """Refuse another package of that name, such as a `pipeline.py` beside a person's own program."""
    ours = Path(__file__).resolve().parent.parent / "pipeline" / "__init__.py"
    found = getattr(find_spec("pipeline"), "origin", None)
    if found is None or Path(found).resolve() != ours:
        raise ImportError(
            f"reduced_mpl: Python finds another package named 'pipeline', {found}, before ours, {ours}. "
            "Rename it, run from another directory, or uninstall the other package"
        )


_require_our_pipeline()

import pipeline  # noqa: E402
import pipeline.networks.architectures  # noqa: E402  (makes our architectures known to timm)

__version__ = pipeline.__version__
__all__ = ["__version__", *pipeline.DOORS]


def __getattr__(name: str) -> Any:
    if name not in pipeline.DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(pipeline.DOORS)}")
    return getattr(pipeline, name)


def __dir__() -> list[str]:
    return sorted(__all__)
