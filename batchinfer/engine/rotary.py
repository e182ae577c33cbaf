"""Cosines and sines of the rotary embedding, as transformers computes them."""

import math

import torch

from batchinfer.engine.decoder_config import Llama3Scaling, Rotary


def rotary_tables(rotary: Rotary, num_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and frequency, float32, [num_positions, dim / 2].

    They stay float32 whatever the model's dtype: in bfloat16 positions beyond 256 could not be told apart.
    """
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.int64).float() / rotary.dim
    frequencies = 1.0 / (rotary.theta**exponents)
    if rotary.scaling is not None:
        frequencies = _llama3(frequencies, rotary.scaling)
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are slowed by the factor, short ones kept, those between blended.

    The formula of transformers' ``_compute_llama3_parameters``, in its order of operations.
    """
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = 2 * math.pi / frequencies
    scaled = torch.where(waves > length / low, frequencies / scaling.factor, frequencies)
    smooth = (length / waves - low) / (high - low)
    blended = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    between = ~(waves < length / high) & ~(waves > length / low)
    return torch.where(between, blended, scaled)
