"""Weights, inputs, moments and text for tests of rule gptq, and a slow reading of its factor."""

import numpy as np
import torch


def moments(x):
    return (x.T @ x / len(x)).contiguous()


def correlated(tokens, columns, seed, shared=0.7):
    """Inputs whose columns resemble each other and differ in size, float32 [tokens, columns]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    common = torch.randn(tokens, 4, generator=generator)
    x = x + shared * common @ torch.randn(4, columns, generator=generator)
    return x * torch.randn(columns, generator=generator).exp()


def weight(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed)) * 0.05


def slow_factor(a, damping):
    """U of the definition in float64."""
    a = a.double().numpy().copy()
    dead = np.diag(a) == 0
    a[dead, :] = 0
    a[:, dead] = 0
    mean = np.diag(a)[~dead].mean()
    a[dead, dead] = mean
    return np.linalg.cholesky(np.linalg.inv(a + damping * mean * np.eye(len(a)))).T


def varied_text(file):
    """Write some text whose characters differ; its path."""
    lines = (
        f"def f{n}(x): return x * {n * n} - {n % 7}  # {chr(97 + n % 26) * (n % 5)}\n"
        for n in range(400)
    )
    file.write_text("".join(lines))
    return file
