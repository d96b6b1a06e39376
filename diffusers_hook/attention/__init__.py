"""Attention as a source of scores: saliency and semantic groups."""
