"""Judging replies without a model: programs and queries are run where they can do no harm."""
