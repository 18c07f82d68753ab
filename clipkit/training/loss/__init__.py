"""Contrastive objectives as pure functions, each in a plain form and in one whose memory grows with N·D, not N².

The plain forms (`clipkit.training.loss.plain`) are the definition; the tiled ones give the same figures. Each rank
holds its own rows and compares them with the rows of all ranks, which have as many each. A rank's loss is the mean over
its own rows, so that the mean over ranks is the loss of the joint batch. The gradients belong to the sum of the ranks'
losses, so that DistributedDataParallel's average over ranks is the gradient of the joint loss; the gradients of a scale
or bias are shares, of which only the mean over ranks is meant. The gradient that comes from above, such as a loss
scaler's factor, must be the same on all ranks. With one process the exchange is the identity and the same code runs.

Similarities and sums are computed in float32 (float64 where features are), also under autocast. Gradients are of first
order only.

Read `plain.py` first, then `tiled_softmax.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
