"""Measuring: how fast a model decodes, and how good its text is. One definition for every script."""
