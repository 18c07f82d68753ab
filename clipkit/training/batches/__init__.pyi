from .dataset import TrainData as TrainData
from .loader import Batch as Batch
from .loader import Batches as Batches
from .loader import describe as describe
from .loader import open_train_data as open_train_data
from .loader import train_batches as train_batches
