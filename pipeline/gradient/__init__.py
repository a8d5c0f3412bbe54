"""The gradient of the labelled loss in the student's targets: replay, derivative, update rules."""
