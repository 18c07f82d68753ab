from .plain import distillation_loss as distillation_loss
from .plain import info_nce as info_nce
from .plain import sigmoid_loss as sigmoid_loss
from .tiled_sigmoid import tiled_sigmoid_loss as tiled_sigmoid_loss
from .tiled_softmax import tiled_distillation_loss as tiled_distillation_loss
from .tiled_softmax import tiled_info_nce as tiled_info_nce
