"""The parts that `train/train.py` puts together.

Settings and recipes (`load_config`), the `Learner` with its optimizer and weights, `Distributed` for several processes,
checkpoints, validation, and what is written of a run. The order of samples and the losses have sub-packages:
`batches` and `loss`. The training loop itself is the job, a program that reads top to bottom.

Read `settings.py` first, then `train_state.py` and `gradient.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
