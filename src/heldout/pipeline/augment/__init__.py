"""Augmentation: copies of training rows whose prompts are changed and whose answers are not."""
