"""From the classes of a teacher to those of the data set: what its distributions say of ours, before anything learns.

A teacher may have classes of its own, C_T of them. Its distributions are stored as they are; a correction makes
distributions over the data set's C classes of them: the identity, a map of classes, or a fit to labelled images.
"""

from pipeline.correction.class_map import UNMAPPED, ClassMap, class_map_of, equal_names, read_class_map
from pipeline.correction.correction import CORRECTION_FILE, Correction, Kind, load_correction
from pipeline.correction.fit import Fit, fit_correction, fit_scaling
from pipeline.correction.prior_shift import PriorKind, fit_prior

__all__ = [
    "CORRECTION_FILE",
    "UNMAPPED",
    "ClassMap",
    "Correction",
    "Fit",
    "Kind",
    "PriorKind",
    "class_map_of",
    "equal_names",
    "fit_correction",
    "fit_prior",
    "fit_scaling",
    "load_correction",
    "read_class_map",
]
