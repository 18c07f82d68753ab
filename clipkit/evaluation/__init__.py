"""Tasks, models and data become results: figures with chance levels, intervals and what they depend on.

`open_task` and `evaluate_model` are what the command runs; `evaluate_retrieval` and `evaluate_zeroshot` are what
training validates with, so that both say the same. `TaskOptions` gathers what is asked, `SharedWork` divides embedding
among ranks, `Result` is compared with a baseline, put side by side and shown on a page. The sub-package `probe` trains
probes on embeddings.

Read `tasks.py` first, then `retrieval.py` and `embedder.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
