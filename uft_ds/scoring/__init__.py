"""Scores for the answers of a data set, given by code, a judge or a reward model."""
