"""Importance estimators: what statistics each needs, and how they become a score."""

from piece_ds.importance.registry import Estimator, Fragment, estimator, estimator_names

__all__ = ["Estimator", "Fragment", "estimator", "estimator_names"]
