from .data import open_probe as open_probe
from .probe import PROBE_KS as PROBE_KS
from .probe import evaluate_probe as evaluate_probe
from .probe import probe_rows as probe_rows
from .probe import readable_rows as readable_rows
