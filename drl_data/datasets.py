"""Features from a store to PyTorch: the front door of the loaders.

FeatureDataset   map-style: any order, any sampler; batches by coalesced reads
FeatureStream    iterable of batches: whole units in shuffled order, read ahead in a thread,
                 sharded by rank and DataLoader worker, resumable
join             several stores of the same samples as one
Draw             one timestep or view drawn for each item
Augment          mirroring and cropping of pixels and maps alike
"""

from __future__ import annotations

from drl_data.augment import Augment
from drl_data.feature_batch import FeatureBatch, FeatureSample, as_tensor, read_features
from drl_data.feature_dataset import FeatureDataset
from drl_data.feature_stream import FeatureStream
from drl_data.joins import JoinedStores, join
from drl_data.selection import Draw

__all__ = [
    "Augment",
    "Draw",
    "FeatureBatch",
    "FeatureDataset",
    "FeatureSample",
    "FeatureStream",
    "JoinedStores",
    "as_tensor",
    "join",
    "read_features",
]
