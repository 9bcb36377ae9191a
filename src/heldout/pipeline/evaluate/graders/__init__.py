"""Graders as OpenAI's API writes them, as metrics: JSON -> Metric (docs/metrics.md)."""
