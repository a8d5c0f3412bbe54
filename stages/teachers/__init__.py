"""Whose answers the pool stages store: a network's, or predictions that somebody made already."""

from stages.teachers.choice import teacher_of
from stages.teachers.classes import class_names
from stages.teachers.corrections import class_map, correction_of, labelled_answers, require_evidence, tell_fit
from stages.teachers.network import NetworkTeacher
from stages.teachers.predictions import PredictionsTeacher
from stages.teachers.teacher import Teacher

__all__ = [
    "NetworkTeacher",
    "PredictionsTeacher",
    "Teacher",
    "class_map",
    "class_names",
    "correction_of",
    "labelled_answers",
    "require_evidence",
    "teacher_of",
    "tell_fit",
]
