"""The doors, their name, and a teacher that nobody here wrote."""

import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.storage.metrics import MetricsLog, read_metrics

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_every_door_opens_under_both_names() -> None:
    import reduced_mpl

    for name, module in pipeline.DOORS.items():
        assert getattr(pipeline, name).__module__.startswith(module)
        assert getattr(reduced_mpl, name) is getattr(pipeline, name)
        assert name in dir(reduced_mpl)
    with pytest.raises(AttributeError, match="no attribute 'Studnet'"):
        _ = reduced_mpl.Studnet


def test_importing_the_library_imports_no_torch() -> None:
    done = python("import pipeline, sys; pipeline.load_recipe('digits'); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_another_package_named_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("")
    done = python(f"import sys; sys.path.append({str(ROOT)!r}); import reduced_mpl", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: reduced_mpl: Python finds another package named 'pipeline'" in done.stderr
    assert str(tmp_path / "pipeline.py") in done.stderr


def test_columns_come_from_what_is_reported(tmp_path: Path) -> None:
    """Also where a name occurs later, is odd, or the training was killed before or after it occurred."""
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 1.5})
        log.write(2, {"loss": 1.0, "their, own": 0.25})
        log.write(3, {"step": 7.0, "their, own": 0.5})
    whole = (tmp_path / "metrics.csv").read_bytes()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "1.5", "their, own": ""},
        {"step": "2", "loss": "1", "their, own": "0.25"},
        {"step": "3", "loss": "", "their, own": "0.5"},
    ]
    with MetricsLog(tmp_path, 1) as log:
        log.write(2, {"loss": 1.0, "their, own": 0.25})
        log.write(3, {"their, own": 0.5})
    assert (tmp_path / "metrics.csv").read_bytes() == whole
