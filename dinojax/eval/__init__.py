"""Evaluations, one Evaluator a file."""
