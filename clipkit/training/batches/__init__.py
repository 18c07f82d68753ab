"""Training batches as a function of seed and position, whoever loads them.

`open_train_data` opens the shards of a recipe, `train_batches` gives the batches of a rank; which sample stands at
which position is decided once and for any number of ranks, workers and threads.

Read `order.py` first, then `dataset.py` and `loader.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
